//! The bytes of sealed pages, below the seam: equal to the paper's codes, ranges and traced tokens
//! bit for bit, and a function of the prefix alone.

mod harness;
mod reference;

use half::f16;
use harness::{Model, Text};
use ott_backend::cache::{Cache, LayerSpec, NewTokens, Row, Tokens};
use ott_backend::{CpuOps, OttConfig, PageLayout};
use proptest::collection::vec;
use proptest::prelude::*;
use reference::{Head, Range, Rules, Token};

/// A cache of three layers and a painted sequence for it.
struct Bench {
    model: Model,
    text: Text,
    cache: Cache<f32>,
}

impl Bench {
    fn new(options: &str, model: &Model, text: &Text, ops: &'static CpuOps) -> Self {
        let config = OttConfig::parse(options).unwrap();
        let spec = |layer| LayerSpec {
            layer,
            config,
            layout: PageLayout::new(&config, layer, model.kv_heads, model.k_dim, model.v_dim)
                .unwrap(),
            ops,
        };
        let specs = (0..model.layers).map(spec).collect();
        Self {
            model: model.clone(),
            text: text.clone(),
            cache: Cache::new(specs, 40, 4),
        }
    }

    /// Tokens `past..past + new` of every layer into the blocks of `table`.
    fn append(&self, past: usize, new: usize, table: &[usize]) {
        let row = Row {
            seq: 1,
            past,
            new,
            table,
        };
        let plans = self.cache.begin(&[row]).unwrap();
        for layer in 0..self.model.layers {
            let [_, k, v] = self.model.qkv(&self.text, layer, past, past + new);
            let (k, v) = (harness::numbers(&k), harness::numbers(&v));
            let k = Tokens::contiguous(&k, new, self.model.k_dim);
            let v = Tokens::contiguous(&v, new, self.model.v_dim);
            let row = &plans[0];
            let faults = self
                .cache
                .append(layer, &[NewTokens { row, q: None, k, v }]);
            assert!(faults.unwrap().is_empty());
        }
        self.cache.end(|_| false).unwrap();
    }

    /// Bytes of the sealed blocks of `table`, layer by layer.
    fn pages(&self, table: &[usize]) -> Vec<Vec<Option<Vec<u8>>>> {
        let layer = |layer| {
            let page = |block: &usize| self.cache.page(layer, *block);
            table.iter().map(page).collect()
        };
        (0..self.model.layers).map(layer).collect()
    }
}

/// Code `j` of `n`, as `docs/layout.md` draws it.
fn code_at(bytes: &[u8], n: usize, bits: u32, j: usize) -> u8 {
    let two = |j: usize| (bytes[j % (n / 4)] >> (2 * (j / (n / 4)))) & 3;
    match bits {
        2 => two(j),
        3 => two(j) | ((bytes[n / 4 + j % (n / 8)] >> (j / (n / 8))) & 1) << 2,
        4 => (bytes[j % (n / 2)] >> (4 * (j / (n / 2)))) & 15,
        _ => bytes[j],
    }
}

fn f16_at(bytes: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32()
}

/// One head's part of page `page` against the reference after the same tokens.
fn check_head(bytes: &[u8], layout: &PageLayout, want: &Head, rules: Rules, page: usize) {
    let (group, sealed) = (rules.group, &want.sealed[page]);
    let here = page * group..(page + 1) * group;
    let traced: Vec<usize> = want
        .traced
        .range(here)
        .map(|t| t.0 - page * group)
        .collect();
    let kept = |t: &usize| !traced.contains(t);
    let k_codes = &bytes[layout.k_codes.clone()];
    let per_channel = group * rules.k_bits as usize / 8;
    for (c, want) in sealed.k_ranges.iter().enumerate() {
        let scale = f16_at(&bytes[layout.k_scale.clone()], c);
        let min = f16_at(&bytes[layout.k_min.clone()], c);
        assert_eq!(Range { scale, min }, *want, "page {page}, key channel {c}");
        for t in (0..group).filter(kept) {
            let mut code = code_at(&k_codes[c * per_channel..], group, rules.k_bits, t);
            if let Some(i) = sealed.boosted.iter().position(|b| *b == c) {
                let plane = &bytes[layout.k_high.clone()][i * group / 8..];
                let bit = (plane[t % (group / 8)] >> (t / (group / 8))) & 1;
                code |= bit << rules.k_bits;
            }
            assert_eq!(
                code, sealed.k_codes[t][c],
                "page {page}, key {t}, channel {c}"
            );
        }
    }
    let (v_dim, v_codes) = (layout.v_dim, &bytes[layout.v_codes.clone()]);
    for t in (0..group).filter(kept) {
        for (g, want) in sealed.v_ranges[t].iter().enumerate() {
            let scale = f16_at(&bytes[layout.v_scale.clone()], g * group + t);
            let min = f16_at(&bytes[layout.v_min.clone()], g * group + t);
            assert_eq!(Range { scale, min }, *want, "page {page}, value {t}");
        }
        for c in 0..v_dim {
            let (start, j) = (c / 128 * 128, c % 128);
            let at = (t * v_dim + start) * rules.v_bits as usize / 8;
            let n = (v_dim - start).min(128);
            let code = code_at(&v_codes[at..], n, rules.v_bits, j);
            assert_eq!(
                code, sealed.v_codes[t][c],
                "page {page}, value {t}, channel {c}"
            );
        }
    }
    let boosted = bytes[layout.k_boosted.clone()].chunks_exact(2);
    let boosted: Vec<usize> = boosted
        .map(|b| usize::from(b[0]) + 256 * usize::from(b[1]))
        .collect();
    assert_eq!(
        boosted, sealed.boosted,
        "page {page}: channels of one more bit"
    );
    if layout.outliers > 0 {
        let slots = bytes[layout.slots.clone()].iter().map(|s| usize::from(*s));
        let slots: Vec<usize> = slots.take_while(|s| *s != 255).collect();
        assert_eq!(slots, traced, "page {page}: places of traced tokens");
    }
}

fn check_pages(options: &str, rules: Rules, model: &Model, ops: &'static CpuOps) {
    let planted = [0, 9, 40, 77, 100, 131, 190, 250, 290, 333];
    let shrink = |p: usize| 0.5 / (1 + p) as f32;
    let text = Text::with_outliers(21, &planted.map(|p| (p, shrink(p))));
    let bench = Bench::new(options, model, &text, ops);
    let tokens = 3 * rules.group + rules.residual;
    let table = [8, 3, 17, 2];
    bench.append(0, tokens, &table);
    for layer in 0..model.layers {
        let layout = bench.cache.layer(layer).unwrap().spec().layout.clone();
        let heads: Vec<Head> = (0..model.kv_heads)
            .map(|h| model.reference(rules, &text, (layer, h), tokens))
            .collect();
        for (page, block) in table[..3].iter().enumerate() {
            let bytes = bench.cache.page(layer, *block).expect("sealed");
            for (h, head) in heads.iter().enumerate() {
                check_head(&bytes[layout.head(h)], &layout, head, rules, page);
            }
        }
        let stats = bench.cache.stats(layer).unwrap();
        assert_eq!(stats.sealed_blocks, 3);
        let traced: usize = heads.iter().map(|h| h.traced.len()).sum();
        assert_eq!(stats.traced_tokens, traced, "layer {layer}");
    }
}

#[test]
fn pages_are_the_references() {
    for ops in CpuOps::available() {
        for (group, residual) in [(32, 32), (64, 0), (128, 32)] {
            for (k_bits, v_bits) in [(2, 2), (3, 4), (4, 3), (8, 8)] {
                let rules = Rules {
                    group,
                    residual,
                    k_bits,
                    v_bits,
                    extra: 3,
                    ..Rules::PAPER
                };
                let options = format!(
                    "paper,group={group},residual={residual},extra=3,k_bits={k_bits},v_bits={v_bits}"
                );
                check_pages(&options, rules, &Model::new("").dims(80, 136), ops);
            }
        }
        check_pages("paper", Rules::PAPER, &Model::new("").dims(256, 256), ops);
        for (k_bits, boost, k_dim) in [
            (2, 12, 64),
            (2, 32, 80),
            (2, 5, 264),
            (3, 12, 64),
            (4, 9, 80),
        ] {
            let rules = Rules {
                boost,
                k_bits,
                ..Rules::PAPER
            };
            let options = format!("paper,k_bits={k_bits},boost={boost}");
            check_pages(&options, rules, &Model::new("").dims(k_dim, 64), ops);
        }
    }
}

/// What a traced token is replaced by leaves no group of values without a range, and no key out of
/// the other keys' range: the codes in its place lie between the others'.
#[test]
fn traced_places_hold_the_mean() {
    let text = Text::with_outliers(22, &[(3, 0.01)]);
    let rules = Rules {
        group: 32,
        outliers: 1,
        ..Rules::PAPER
    };
    let model = Model::new("").dims(64, 64);
    let bench = Bench::new(
        "paper,group=32,outliers=1,k_bits=8,v_bits=8",
        &model,
        &text,
        CpuOps::best().unwrap(),
    );
    bench.append(0, 64, &[1, 2]);
    let (layer, want) = (bench.cache.layer(2).unwrap(), model.tokens(&text, 2, 0, 32));
    let page = layer.head(1, 0);
    let mut keys = vec![0.0; 32 * 64];
    page.dequantize_keys(&mut keys, 32);
    for c in 0..64 {
        let others = want.iter().enumerate().filter(|(t, _)| *t != 3);
        let mean = others.map(|(_, t): (usize, &Token)| t.k[c]).sum::<f32>() / 31.0;
        // Half a step of 255 over a range below 4, and f16 for scale and minimum.
        assert!((keys[c * 32 + 3] - mean).abs() < 0.012, "channel {c}");
    }
    assert_eq!(rules.in_layer(2).outliers, 1);
}

proptest! {
    #![proptest_config(harness::proptest_config())]

    /// The bytes of a page depend on nothing but the tokens up to its end: not on the steps in
    /// which they came, nor on the blocks, nor on whether the window or the sequence's end sealed
    /// it.
    #[test]
    fn bytes_are_a_function_of_the_prefix(
        seed in 0u64..1000,
        clip in prop::sample::select(vec!["none", "k", "kv"]),
        chunks in vec(prop_oneof![1usize..5, 1usize..90], 1..14),
    ) {
        let options = format!("group=32,residual=32,outliers=2,extra=3,clip={clip}");
        let planted = [0, 17, 41, 70, 99, 130, 131, 180, 222];
        let text = Text::with_outliers(seed, &planted.map(|p| (p, 0.5 / (1 + p) as f32)));
        let model = Model::new("").heads(2, 1);
        let tokens: usize = chunks.iter().sum();
        prop_assume!(tokens < 19 * 32);
        let table = |first: usize, step: usize| -> Vec<usize> {
            (0..=tokens / 32).map(|i| first + i * step).collect()
        };
        let bench = |table: &[usize], chunks: &[usize]| {
            let bench = Bench::new(&options, &model, &text, CpuOps::best().unwrap());
            let mut past = 0;
            for new in chunks {
                bench.append(past, *new, table);
                past += new;
            }
            bench
        };
        let (a, b) = (table(1, 1), table(2, 2).into_iter().map(|t| 41 - t).collect::<Vec<_>>());
        let (whole, parts) = (bench(&a, &[tokens]), bench(&b, &chunks));
        prop_assert_eq!(whole.pages(&a), parts.pages(&b));
        let sealed = tokens.saturating_sub(32) / 32;
        prop_assert!(whole.pages(&a).iter().all(|l| l.iter().flatten().count() == sealed));
        // The end of the sequence seals what is full; a longer sequence seals the same bytes.
        prop_assert!(parts.cache.released(1, &b).is_empty());
        let full = tokens / 32;
        let ended = parts.pages(&b);
        prop_assert!(ended.iter().all(|l| l.iter().flatten().count() == full));
        let longer = bench(&table(1, 1).into_iter().chain([38, 39]).collect::<Vec<_>>(), &[full * 32 + 32]);
        prop_assert_eq!(&longer.pages(&a[..full]), &ended.iter().map(|l| l[..full].to_vec()).collect::<Vec<_>>());
    }
}
