//! Plots as SVG: quality against bits, divergence by position and by layer.

use std::fmt::Write;

use crate::results::Outcome;

const WIDTH: f64 = 820.0;
const HEIGHT: f64 = 520.0;
const MARGIN: f64 = 60.0;
const COLORS: [&str; 8] = [
    "#1b6ca8", "#c8553d", "#3a7d44", "#7d5ba6", "#b8860b", "#444444", "#00868b", "#a0457e",
];

/// One axis: its ends, where they are drawn, its marks.
struct Axis {
    ends: (f64, f64),
    marks: Vec<f64>,
    logarithmic: bool,
    title: String,
}

impl Axis {
    /// Divergence, over those decades that the numbers need.
    fn divergence(numbers: impl Iterator<Item = f64>, what: &str) -> Self {
        let (mut low, mut high) = (0.01f64, 0.01f64);
        for x in numbers.filter(|x| *x >= 1e-5) {
            (low, high) = (low.min(x), high.max(x));
        }
        let (low, high) = (low.log10().floor() as i32, high.log10().ceil() as i32);
        Self {
            ends: (10f64.powi(low), 10f64.powi(high)),
            marks: (low..=high).map(|e| 10f64.powi(e)).collect(),
            logarithmic: true,
            title: format!("{what}, nats"),
        }
    }

    /// From 0 on.
    fn linear(end: f64, title: &str) -> Self {
        Self {
            ends: (0.0, end),
            marks: (0..=8).map(|i| end * f64::from(i) / 8.0).collect(),
            logarithmic: false,
            title: title.to_owned(),
        }
    }

    /// Where a number lies.
    fn place(&self, number: f64, from: f64, to: f64) -> f64 {
        let (low, high) = self.ends;
        let number = number.clamp(low, high);
        let share = match self.logarithmic {
            true => (number / low).ln() / (high / low).ln(),
            false => (number - low) / (high - low),
        };
        from + share * (to - from)
    }
}

struct Plot {
    x: Axis,
    y: Axis,
    svg: String,
    names: Vec<String>,
}

impl Plot {
    fn new(x: Axis, y: Axis) -> Self {
        let mut plot = Self {
            x,
            y,
            svg: format!(
                "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
                 font-family=\"sans-serif\" font-size=\"11\">\n\
                 <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
            ),
            names: Vec::new(),
        };
        let (bottom, right) = (HEIGHT - MARGIN, WIDTH - MARGIN);
        for mark in plot.x.marks.clone() {
            let x = plot.at(mark, 1.0).0;
            plot.add(format!(
                "<path d=\"M{x:.0} {MARGIN}V{bottom}\" stroke=\"#ddd\"/>\
                 <text x=\"{x:.0}\" y=\"{}\" text-anchor=\"middle\">{mark}</text>",
                bottom + 16.0
            ));
        }
        for mark in plot.y.marks.clone() {
            let y = plot.at(1.0, mark).1;
            plot.add(format!(
                "<path d=\"M{MARGIN} {y:.0}H{right}\" stroke=\"#ddd\"/>\
                 <text x=\"{}\" y=\"{:.0}\" text-anchor=\"end\">{mark}</text>",
                MARGIN - 6.0,
                y + 4.0
            ));
        }
        let (x, y) = (plot.x.title.clone(), plot.y.title.clone());
        plot.add(format!(
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{x}</text>\n\
             <text x=\"{MARGIN}\" y=\"20\">{y}</text>",
            WIDTH / 2.0,
            HEIGHT - 14.0
        ));
        plot
    }

    fn add(&mut self, line: String) {
        let _ = writeln!(self.svg, "{line}");
    }

    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        (
            self.x.place(x, MARGIN, WIDTH - MARGIN),
            self.y.place(y, HEIGHT - MARGIN, MARGIN),
        )
    }

    /// The color of what has this name.
    fn color(&mut self, name: &str) -> &'static str {
        let index = self.names.iter().position(|n| n == name);
        let index = index.unwrap_or_else(|| {
            self.names.push(name.to_owned());
            self.names.len() - 1
        });
        COLORS[index % COLORS.len()]
    }

    fn line(&mut self, name: &str, points: &[(f64, f64)]) {
        let color = self.color(name);
        let mut path = String::new();
        for (i, (x, y)) in points.iter().enumerate() {
            let (x, y) = self.at(*x, *y);
            let _ = write!(path, "{}{x:.1} {y:.1}", if i == 0 { 'M' } else { 'L' });
        }
        self.add(format!(
            "<path d=\"{path}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.5\"/>"
        ));
    }

    fn point(&mut self, name: &str, label: &str, (x, y): (f64, f64)) {
        let color = self.color(name);
        let (x, y) = self.at(x, y);
        self.add(format!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{color}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" fill=\"{color}\">{label}</text>",
            x + 6.0,
            y + 4.0
        ));
    }

    /// With what each color means.
    fn finish(mut self) -> String {
        for (i, name) in std::mem::take(&mut self.names).into_iter().enumerate() {
            self.add(format!(
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"{}\">{name}</text>",
                WIDTH - 12.0,
                16.0 + 13.0 * i as f64,
                COLORS[i % COLORS.len()]
            ));
        }
        self.svg + "</svg>\n"
    }
}

/// The model's short name and the text.
fn series(outcome: &Outcome) -> String {
    let key = &outcome.key;
    let model = key.model.split('-').next().unwrap_or_default();
    format!("{model}, {}, {} tokens", key.text, key.tokens)
}

/// The layer that a spec is for, and the spec.
fn layer(outcome: &Outcome) -> Option<(&str, usize)> {
    let (spec, layer) = outcome.key.spec.split_once('@')?;
    Some((spec, layer.parse().ok()?))
}

/// Quality against bits: a point for each cache that treats all layers alike.
pub fn bits(all: &[Outcome]) -> String {
    let shown = || all.iter().filter(|o| !o.key.spec.contains('@'));
    let x = Axis {
        ends: (2.0, 18.0),
        marks: vec![2.0, 3.0, 4.0, 6.0, 8.0, 16.0],
        logarithmic: true,
        title: "bits of a number, scales included, window not".to_owned(),
    };
    let y = Axis::divergence(shown().map(|o| o.summary.mean), "mean divergence");
    let mut plot = Plot::new(x, y);
    for outcome in shown().filter(|o| o.page_bits < 16.0) {
        let at = (outcome.page_bits, outcome.summary.mean);
        plot.point(&series(outcome), &outcome.key.spec, at);
    }
    plot.finish()
}

/// Divergence by position, a line for each cache and text.
pub fn positions(all: &[Outcome]) -> String {
    let shown = || {
        let whole = all.iter().filter(|o| !o.key.spec.contains('@'));
        whole.filter(|o| o.page_bits < 16.0 && o.summary.by_position.len() == 32)
    };
    let most = shown().map(|o| o.key.tokens).max().unwrap_or(1);
    let means = shown().flat_map(|o| o.summary.by_position.iter().copied());
    let y = Axis::divergence(means, "divergence, means over a 32nd of the text");
    let mut plot = Plot::new(Axis::linear(most as f64, "position"), y);
    for outcome in shown() {
        let means = outcome.summary.by_position.iter().enumerate();
        let width = outcome.key.tokens as f64 / 32.0;
        let points: Vec<(f64, f64)> = means
            .map(|(i, kld)| ((i as f64 + 0.5) * width, *kld))
            .collect();
        plot.line(
            &format!("{}: {}", series(outcome), outcome.key.spec),
            &points,
        );
    }
    plot.finish()
}

/// Divergence that one layer alone brings, the others in full precision.
pub fn layers(all: &[Outcome]) -> String {
    let shown = || all.iter().filter_map(|o| Some((o, layer(o)?)));
    let most = shown().map(|(_, (_, layer))| layer).max().unwrap_or(1);
    let means = shown().map(|(o, _)| o.summary.mean);
    let y = Axis::divergence(
        means,
        "mean divergence, one layer in the cache, the others in f16",
    );
    let mut plot = Plot::new(Axis::linear(most as f64 + 1.0, "layer"), y);
    let mut names: Vec<String> = Vec::new();
    for (outcome, (spec, _)) in shown() {
        let name = format!("{}: {spec}", series(outcome));
        if names.contains(&name) {
            continue;
        }
        let same = shown().filter(|(o, (s, _))| format!("{}: {s}", series(o)) == name);
        let mut points: Vec<(f64, f64)> = same
            .map(|(o, (_, layer))| (layer as f64, o.summary.mean))
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        plot.line(&name, &points);
        names.push(name);
    }
    plot.finish()
}
