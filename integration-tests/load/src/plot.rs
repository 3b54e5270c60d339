//! Latencies as a picture (SVG): which share of them took no longer.

use std::fmt::Write;

const WIDTH: f64 = 820.0;
const HEIGHT: f64 = 460.0;
const MARGIN: f64 = 60.0;
const COLORS: [&str; 8] = [
    "#1b6ca8", "#c8553d", "#3a7d44", "#7d5ba6", "#b8860b", "#444444", "#00868b", "#a0457e",
];
/// Points of a line: more cannot be seen.
const POINTS: usize = 400;
/// Milliseconds: below it nothing is told apart.
const LEAST: f64 = 0.01;

/// One line: its name, and numbers in milliseconds.
pub type Line = (String, Vec<f64>);

/// The cumulative distribution of each line; the axis of milliseconds is logarithmic.
pub fn distributions(title: &str, lines: &mut [Line]) -> String {
    let mut ends = (f64::INFINITY, 0.0f64);
    for (_, numbers) in lines.iter_mut() {
        // What came together is drawn at the left end.
        numbers.iter_mut().for_each(|ms| *ms = ms.max(LEAST));
        numbers.sort_by(f64::total_cmp);
        if let (Some(first), Some(last)) = (numbers.first(), numbers.last()) {
            ends = (ends.0.min(*first), ends.1.max(*last));
        }
    }
    let low = ends.0.min(1.0).log10().floor() as i32;
    let high = (ends.1.max(1.0).log10().ceil() as i32).max(low + 1);
    let x = |ms: f64| {
        let share = (ms.log10() - f64::from(low)) / f64::from(high - low);
        MARGIN + share * (WIDTH - 2.0 * MARGIN)
    };
    let y = |share: f64| HEIGHT - MARGIN - share * (HEIGHT - 2.0 * MARGIN);
    let mut svg = frame(title);
    for mark in low..=high {
        let (at, top, bottom) = (x(10f64.powi(mark)), y(1.0), y(0.0));
        let (label, below) = (10f64.powi(mark), bottom + 16.0);
        let _ = writeln!(svg, "<path d=\"M{at:.0} {top}V{bottom}\" stroke=\"#ddd\"/><text x=\"{at:.0}\" y=\"{below}\" text-anchor=\"middle\">{label}</text>");
    }
    for mark in [0.0, 0.25, 0.5, 0.75, 0.95, 1.0] {
        let (at, left, right) = (y(mark), MARGIN, WIDTH - MARGIN);
        let (before, below) = (left - 6.0, at + 4.0);
        let _ = writeln!(svg, "<path d=\"M{left} {at:.0}H{right}\" stroke=\"#ddd\"/><text x=\"{before}\" y=\"{below:.0}\" text-anchor=\"end\">{mark}</text>");
    }
    for (i, (name, numbers)) in lines.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        let mut path = String::new();
        for point in 0..=POINTS.min(numbers.len().saturating_sub(1)) {
            let index = point * numbers.len().saturating_sub(1)
                / POINTS.min(numbers.len().saturating_sub(1)).max(1);
            let Some(ms) = numbers.get(index) else { break };
            let share = (index + 1) as f64 / numbers.len() as f64;
            let _ = write!(
                path,
                "{}{:.1} {:.1}",
                if point == 0 { 'M' } else { 'L' },
                x(*ms),
                y(share)
            );
        }
        let below = 36.0 + 13.0 * i as f64;
        let _ = writeln!(svg, "<path d=\"{path}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.5\"/><text x=\"{}\" y=\"{below}\" fill=\"{color}\">{}</text>", MARGIN + 8.0, escape(name));
    }
    svg + "</svg>\n"
}

fn frame(title: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{MARGIN}\" y=\"16\">{}</text>\n\
         <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">milliseconds</text>\n",
        escape(title),
        WIDTH / 2.0,
        HEIGHT - 14.0
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
