//! Keys weighed by queries: against a dense factorization in f64, and for what it is there for.

mod harness;
mod reference;

use harness::{difference, Model, Role, Text};
use ott_backend::cache::{Cache, LayerSpec, NewQueries, NewTokens, Row, Stored, Tokens};
use ott_backend::{CpuOps, OttConfig, PageLayout};
use reference::Range;

const K_DIM: usize = 64;
const HEADS: usize = 3;
const GROUP: usize = 128;

/// Keys `(tokens, K_DIM)` of one head, and queries `(HEADS, tokens, K_DIM)` that use few channels much, most of them
/// in one direction.
fn painted(seed: u64, tokens: usize) -> (Vec<f32>, Vec<f32>) {
    let text = Text::new(seed);
    let numbers = |role: Role, heads: usize| -> Vec<f32> {
        let places = (0..heads).flat_map(|h| (0..tokens).map(move |t| (h, t)));
        let row = |(h, t): (usize, usize)| (0..K_DIM).map(move |c| (h, t, c));
        let places = places.flat_map(row);
        places
            .map(|(h, t, c)| text.number(role, 2, h, t, c))
            .collect()
    };
    let mut q = numbers(Role::Query, HEADS);
    for (i, q) in q.iter_mut().enumerate() {
        let c = i % K_DIM;
        let shared = [1.5, -1.0, 0.5, 0.0, -2.0][c % 5];
        *q = (*q + shared) * if c % 9 == 4 { 4.0 } else { 1.0 };
    }
    (numbers(Role::Key, 1), q)
}

/// The keys of the first group as they are read back once it is sealed.
fn sealed(options: &str, k: &[f32], q: Option<&[f32]>) -> Vec<f32> {
    let config = OttConfig::parse(options).unwrap();
    let spec = LayerSpec {
        layer: 2,
        config,
        layout: PageLayout::new(&config, 2, 1, K_DIM, K_DIM).unwrap(),
        ops: CpuOps::best().unwrap(),
    };
    let tokens = k.len() / K_DIM;
    let row = Row {
        seq: 1,
        past: 0,
        new: tokens,
        table: &[1, 2],
    };
    let cache = Cache::<f32>::new(vec![spec], 3, 1);
    let plans = cache.begin(&[row]).unwrap();
    let q = q.map(|q| NewQueries {
        tokens: Tokens::contiguous(q, tokens, K_DIM),
        num_heads: HEADS,
    });
    let k = Tokens::contiguous(k, tokens, K_DIM);
    let row = &plans[0];
    let faults = cache.append(0, &[NewTokens { row, q, k, v: k }]);
    assert!(faults.unwrap().is_empty());
    let group = Stored {
        tokens: GROUP,
        ..row.after()
    };
    let (k, _) = cache.layer(0).unwrap().gather(&group);
    k
}

/// `A = U D U'`, U unit upper triangular, by elimination: `u[j][i]` for j < i.
fn factors(mut a: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let n = a.len();
    let mut u = vec![vec![0f64; n]; n];
    for i in (0..n).rev() {
        for j in 0..i {
            u[j][i] = a[j][i] / a[i][i];
        }
        for j in 0..i {
            for k in 0..i {
                a[j][k] -= u[j][i] * a[i][i] * u[k][i];
            }
        }
    }
    u
}

/// Keys of a group as docs/layout.md says that they are read back, with ranges from min to max.
fn expected(k: &[f32], q: &[f32], bits: u32, boost: usize) -> Vec<f64> {
    let tokens = k.len() / K_DIM;
    let (mut mean, mut square) = (vec![0f64; K_DIM], vec![0f64; K_DIM]);
    let sampled: Vec<usize> = (0..GROUP).filter(|t| t % 16 == 15).collect();
    let count = (sampled.len() * HEADS) as f64;
    for t in &sampled {
        for h in 0..HEADS {
            for c in 0..K_DIM {
                let q = f64::from(q[(h * tokens + t) * K_DIM + c]);
                mean[c] += q / count;
                square[c] += q * q / count;
            }
        }
    }
    let channel = |c: usize| (0..GROUP).map(|t| k[t * K_DIM + c]).collect::<Vec<f32>>();
    let mut ranges: Vec<(Range, u32)> = (0..K_DIM)
        .map(|c| (Range::of(&channel(c), bits, true), bits))
        .collect();
    let cost = |c: usize| {
        let (range, bits) = ranges[c];
        let error = |x: &f32| f64::from(x - range.value(range.code(*x, bits))).powi(2);
        channel(c).iter().map(error).sum::<f64>() * square[c]
    };
    let mut boosted: Vec<usize> = (0..K_DIM).collect();
    boosted.sort_by(|a, b| cost(*b).total_cmp(&cost(*a)));
    boosted.truncate(boost);
    boosted.sort_unstable();
    for &c in &boosted {
        ranges[c] = (Range::of(&channel(c), bits + 1, true), bits + 1);
    }
    let others = (0..K_DIM).filter(|c| !boosted.contains(c));
    let order: Vec<usize> = boosted.iter().copied().chain(others).collect();
    let floor = square.iter().sum::<f64>() / (64 * K_DIM) as f64;
    let entry = |i: usize, j: usize| {
        let (a, b) = (order[i], order[j]);
        let own = (square[a] - mean[a] * mean[a]).max(0.0) + floor;
        mean[a] * mean[b] + if i == j { own } else { 0.0 }
    };
    let u = factors(
        (0..K_DIM)
            .map(|i| (0..K_DIM).map(|j| entry(i, j)).collect())
            .collect(),
    );
    let mut back = vec![0f64; GROUP * K_DIM];
    for t in 0..GROUP {
        let mut errors = vec![0f64; K_DIM];
        for i in 0..K_DIM {
            let (c, x) = (order[i], f64::from(k[t * K_DIM + order[i]]));
            let made_up: f64 = (0..i).map(|j| u[j][i] * errors[j]).sum();
            let (range, bits) = ranges[c];
            let value = f64::from(range.value(range.code((x + made_up) as f32, bits)));
            errors[i] = x - value;
            back[t * K_DIM + c] = value;
        }
    }
    back
}

#[test]
fn codes_are_those_of_a_dense_factorization() {
    for (bits, boost) in [(2, 0), (2, 12), (3, 12), (4, 0)] {
        let (k, q) = painted(u64::from(bits), GROUP + 32);
        let options = format!("paper,outliers=0,weigh=q,k_bits={bits},boost={boost}");
        let got = sealed(&options, &k, Some(&q));
        let want = expected(&k, &q, bits, boost);
        let differ = got
            .iter()
            .zip(&want)
            .filter(|(a, b)| (f64::from(**a) - **b).abs() > 1e-4);
        // A sum that rounds to the other side of a tie moves a few codes of its token after it.
        let differ = differ.count();
        assert!(
            differ <= 40,
            "{bits} bits, boost {boost}: {differ} of {} differ",
            got.len()
        );
    }
}

#[test]
fn scores_of_the_queries_err_less() {
    let (k, q) = painted(7, GROUP + 64);
    let error = |options: &str| -> f64 {
        let back = sealed(options, &k, Some(&q));
        let score = |q: &[f32], t: usize| -> f64 {
            let off = |c: usize| f64::from(k[t * K_DIM + c] - back[t * K_DIM + c]);
            (0..K_DIM).map(|c| f64::from(q[c]) * off(c)).sum()
        };
        let queries = q.chunks_exact(K_DIM);
        queries
            .flat_map(|q| (0..GROUP).map(move |t| score(q, t).powi(2)))
            .sum()
    };
    for options in ["", "3bit", "4bit", "boost=0", "paper"] {
        let none = error(format!("{options},weigh=none").trim_start_matches(','));
        let weighed = error(format!("{options},weigh=q").trim_start_matches(','));
        assert!(weighed < 0.5 * none, "`{options}`: {weighed} of {none}");
    }
}

#[test]
fn without_queries_all_channels_count_alike() {
    let (k, q) = painted(3, GROUP + 64);
    let zero = vec![0f32; q.len()];
    let none = sealed("weigh=none", &k, Some(&q));
    assert_eq!(sealed("", &k, None), none);
    assert_eq!(sealed("", &k, Some(&zero)), none);
    assert_ne!(sealed("", &k, Some(&q)), none);
}

/// As a prompt, token by token, and with a part that is written twice, other queries at first.
#[test]
fn pages_are_the_same_however_tokens_come() {
    let host = Model::new("group=32").heads(6, 2).host(40);
    let text = Text::new(5);
    let stored = |s: &harness::Sequence| -> Vec<_> {
        (0..host.model.layers)
            .map(|layer| host.past(s, layer).unwrap())
            .collect()
    };
    let mut whole = host.sequence(1, &text, &[1, 2, 3, 4, 5, 6]);
    host.step(&mut whole, 150, true).unwrap();
    let mut single = host.sequence(2, &text, &[7, 8, 9, 10, 11, 12]);
    host.step(&mut single, 7, true).unwrap();
    (7..150).for_each(|_| drop(host.step(&mut single, 1, false).unwrap()));
    let mut twice = host.sequence(3, &text.forked(40, 6), &[13, 14, 15, 16, 17, 18]);
    host.step(&mut twice, 60, true).unwrap();
    (twice.text, twice.past) = (text.clone(), 40);
    host.step(&mut twice, 110, true).unwrap();
    let want = stored(&whole);
    assert_eq!(difference(&stored(&single), &want), None);
    assert_eq!(difference(&stored(&twice), &want), None);
}
