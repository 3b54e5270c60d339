//! Quality against bits, as an SVG: both axes logarithmic, a point for each cache.

use std::fmt::Write;

use crate::results::Outcome;

const WIDTH: f64 = 820.0;
const HEIGHT: f64 = 520.0;
const MARGIN: f64 = 60.0;
const COLORS: [&str; 6] = [
    "#1b6ca8", "#c8553d", "#3a7d44", "#7d5ba6", "#b8860b", "#444444",
];

/// Bits of the left and the right edge.
const BITS: (f64, f64) = (2.0, 18.0);
/// Divergence of the lower and the upper edge, nats.
const KLD: (f64, f64) = (1e-4, 4.0);

/// A plot of all outcomes; each text of each model has its color.
pub fn svg(outcomes: &[Outcome]) -> String {
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for bits in [2.0, 3.0, 4.0, 6.0, 8.0, 16.0] {
        let x = x(bits);
        let _ = writeln!(
            out,
            "<path d=\"M{x:.0} {MARGIN}V{:.0}\" stroke=\"#ddd\"/><text x=\"{x:.0}\" y=\"{:.0}\" \
             text-anchor=\"middle\">{bits}</text>",
            HEIGHT - MARGIN,
            HEIGHT - MARGIN + 16.0
        );
    }
    for kld in [1e-4, 1e-3, 1e-2, 1e-1, 1.0] {
        let y = y(kld);
        let _ = writeln!(
            out,
            "<path d=\"M{MARGIN} {y:.0}H{:.0}\" stroke=\"#ddd\"/><text x=\"{:.0}\" y=\"{:.0}\" \
             text-anchor=\"end\">{kld}</text>",
            WIDTH - MARGIN,
            MARGIN - 6.0,
            y + 4.0
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"middle\">bits of a number, scales included, window not</text>\n\
         <text x=\"{MARGIN}\" y=\"20\">mean divergence from full precision, nats</text>",
        WIDTH / 2.0,
        HEIGHT - 14.0
    );
    let mut series: Vec<String> = Vec::new();
    for outcome in outcomes {
        let key = &outcome.key;
        let name = format!("{}, {}, {} tokens", key.model, key.text, key.tokens);
        let index = series.iter().position(|s| *s == name).unwrap_or_else(|| {
            series.push(name);
            series.len() - 1
        });
        let (x, y) = (x(outcome.page_bits), y(outcome.summary.mean));
        let color = COLORS[index % COLORS.len()];
        let _ = writeln!(
            out,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{color}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" fill=\"{color}\">{}</text>",
            x + 6.0,
            y + 4.0,
            key.spec
        );
    }
    for (i, name) in series.iter().enumerate() {
        let _ = writeln!(
            out,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\" fill=\"{}\">{name}</text>",
            WIDTH - 12.0,
            20.0 + 14.0 * i as f64,
            COLORS[i % COLORS.len()]
        );
    }
    out + "</svg>\n"
}

fn x(bits: f64) -> f64 {
    place(bits, BITS, MARGIN, WIDTH - MARGIN)
}

fn y(kld: f64) -> f64 {
    place(kld, KLD, HEIGHT - MARGIN, MARGIN)
}

/// Where a number lies between two ends, by its logarithm.
fn place(number: f64, (low, high): (f64, f64), from: f64, to: f64) -> f64 {
    let share = (number.clamp(low, high) / low).ln() / (high / low).ln();
    from + share * (to - from)
}
