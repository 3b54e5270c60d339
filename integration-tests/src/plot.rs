//! Plots as SVG.

use std::fmt::Write;

const WIDTH: f64 = 820.0;
const HEIGHT: f64 = 520.0;
const MARGIN: f64 = 60.0;
const COLORS: [&str; 8] = [
    "#1b6ca8", "#c8553d", "#3a7d44", "#7d5ba6", "#b8860b", "#444444", "#00868b", "#a0457e",
];

/// One axis: its ends, where they are drawn, its marks.
pub struct Axis {
    /// Smallest and largest number shown.
    pub ends: (f64, f64),
    /// Where lines are drawn.
    pub marks: Vec<f64>,
    /// Whether equal ratios are equally long.
    pub logarithmic: bool,
    /// What it counts, and its unit.
    pub title: String,
}

impl Axis {
    /// Logarithmic, over those decades that these positive numbers need.
    pub fn decades(numbers: impl Iterator<Item = f64>, title: String) -> Self {
        let (mut least, mut most) = (f64::MAX, f64::MIN_POSITIVE);
        for x in numbers {
            (least, most) = (least.min(x), most.max(x));
        }
        let low = least.min(most).log10().floor() as i32;
        let high = (most.log10().ceil() as i32).max(low + 1);
        Self {
            ends: (10f64.powi(low), 10f64.powi(high)),
            marks: (low..=high).map(|e| 10f64.powi(e)).collect(),
            logarithmic: true,
            title,
        }
    }

    /// From 0 on.
    pub fn linear(end: f64, title: &str) -> Self {
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

/// Lines and points over two axes; what has one name has one color.
pub struct Plot {
    x: Axis,
    y: Axis,
    svg: String,
    names: Vec<String>,
}

impl Plot {
    /// Empty, with the marks of both axes.
    pub fn new(x: Axis, y: Axis) -> Self {
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

    /// Through these points.
    pub fn line(&mut self, name: &str, points: &[(f64, f64)]) {
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

    /// One, and what stands beside it.
    pub fn point(&mut self, name: &str, label: &str, (x, y): (f64, f64)) {
        let color = self.color(name);
        let (x, y) = self.at(x, y);
        self.add(format!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{color}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" fill=\"{color}\">{label}</text>",
            x + 6.0,
            y + 4.0
        ));
    }

    /// The picture, with what each color means.
    pub fn finish(mut self) -> String {
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
