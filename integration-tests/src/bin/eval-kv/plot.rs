//! Quality against bits, divergence by position and by layer.

use integration_tests::plot::{Axis, Plot};

use crate::results::Outcome;

/// An axis of divergences: 0.01 is always on it, what is below a hundred thousandth never.
fn divergence(numbers: impl Iterator<Item = f64>, what: &str) -> Axis {
    let shown = numbers.filter(|x| *x >= 1e-5);
    Axis::decades(shown.chain([0.01]), format!("{what}, nats"))
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
    let y = divergence(shown().map(|o| o.summary.mean), "mean divergence");
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
    let y = divergence(means, "divergence, means over a 32nd of the text");
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
    let y = divergence(
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
