//! The cache through the seam against the paper in plain lines: what is stored and what attention
//! answers, at awkward sizes, in every dtype and number of bits.

mod harness;
mod reference;

use candle_core::{DType, Tensor};
use harness::{rows, Host, Model, Sequence, Text};
use reference::{Rules, Token};

const RULES: Rules = Rules::PAPER;

/// Attention in f32 against f64: scores err by about 1e-6 of their size, which is below 30 here, and
/// an error in a score is a relative error of its weight. The values lie in -1..1.
const F32: f64 = 5e-5;
/// The answer is rounded to the activation dtype: half a unit in the last place of numbers below 1.
const F16: f64 = F32 + 2.5e-4;
const BF16: f64 = F32 + 2e-3;
/// Dequantised numbers: one product and one sum in f32, fused or not, then rounded to the dtype.
fn stored_budget(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 1e-6,
        DType::F16 => 1.0 / 2048.0,
        _ => 1.0 / 256.0,
    }
}

fn budget(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => F32,
        DType::F16 => F16,
        _ => BF16,
    }
}

fn text(seed: u64) -> Text {
    let planted = [0, 5, 33, 40, 100, 129, 200, 300, 700, 1500];
    let shrink = |i: usize| 0.3 / (1 + i * i) as f32;
    Text::with_outliers(seed, &planted.map(|p| (p, shrink(p % 17))))
}

/// A cache and a table of blocks, neither in order nor without gaps, for `tokens` tokens.
fn host_for(model: &Model, tokens: usize) -> (Host, Vec<usize>) {
    let count = tokens / model.block_size() + 1;
    let odd = (0..count).map(|i| 2 * i + 1).rev();
    let (front, back): (Vec<usize>, Vec<usize>) = odd.partition(|b| b % 3 == 0);
    (model.host(2 * count + 1), [front, back].concat())
}

/// Everything stored is what the reference holds, in every head of the first and the last layer.
fn check_past(host: &Host, s: &Sequence, rules: Rules, what: &str) {
    for layer in [0, host.model.layers - 1] {
        let past = host.past(s, layer).unwrap();
        for (h, got) in past.iter().enumerate() {
            let want = host
                .model
                .reference(rules, &s.text, (layer, h), s.past)
                .past();
            assert_eq!(got.len(), want.len(), "{what}");
            for (t, (got, want)) in got.iter().zip(&want).enumerate() {
                let all = |t: &Token| t.k.iter().chain(&t.v).copied().collect::<Vec<f32>>();
                for (g, w) in all(got).iter().zip(all(want)) {
                    let near = (g - w).abs() <= stored_budget(host.model.dtype) * (1.0 + w.abs());
                    assert!(
                        near,
                        "{what}: layer {layer}, head {h}, token {t}: {g} for {w}"
                    );
                }
            }
        }
    }
}

/// One decoded token per step, for a few steps; every head of the first and the last layer.
fn check_decode(host: &Host, s: &mut Sequence, rules: Rules, steps: usize, what: &str) {
    let model = host.model.clone();
    for _ in 0..steps {
        let at = s.past;
        let out = host.step(s, 1, false).unwrap();
        for layer in [0, model.layers - 1] {
            let [q, _, _] = model.qkv(&s.text, layer, at, at + 1);
            let out = out[layer].as_ref().unwrap();
            assert_eq!(out.dtype(), model.dtype);
            assert_eq!(out.dims(), [1, model.heads, 1, model.v_dim]);
            let (q, out) = (rows(&q).unwrap(), rows(out).unwrap());
            for kv in 0..model.kv_heads {
                let head = model.reference(rules, &s.text, (layer, kv), at + 1);
                let group = model.heads / model.kv_heads;
                for h in kv * group..(kv + 1) * group {
                    let want = head.attend(&q[h][0], model.attn.scale, model.attn.softcap);
                    near(
                        &out[h][0],
                        &want,
                        budget(model.dtype),
                        &format!("{what}: layer {layer}, head {h}, token {at}"),
                    );
                }
            }
        }
    }
}

fn near(got: &[f32], want: &[f64], budget: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().zip(want) {
        let error = (f64::from(*got) - want).abs();
        assert!(
            error <= budget,
            "{what}: {got} for {want}, {budget:.1e} allowed"
        );
    }
}

/// Store `tokens` tokens by prompt, look at them, decode a few more.
fn check(model: Model, rules: Rules, tokens: usize) {
    let what = format!(
        "{}/{} heads of {}/{}, {:?}, {}, {tokens} tokens",
        model.heads, model.kv_heads, model.k_dim, model.v_dim, model.dtype, model.options
    );
    let (host, table) = host_for(&model, tokens + 4);
    let mut s = host.sequence(1, &text(tokens as u64), &table);
    host.step(&mut s, tokens, true).unwrap();
    check_past(&host, &s, rules, &what);
    check_decode(&host, &mut s, rules, 3, &what);
    check_past(&host, &s, rules, &what);
}

#[test]
fn every_length_around_the_seams() {
    for tokens in [
        1, 2, 31, 32, 33, 127, 128, 129, 157, 158, 159, 160, 161, 287, 288, 289, 417,
    ] {
        check(Model::new("paper"), RULES, tokens);
    }
}

#[test]
fn every_head_size_and_ratio() {
    let sizes = [
        (64, 64),
        (80, 80),
        (96, 96),
        (128, 128),
        (256, 256),
        (64, 128),
        (96, 80),
        (24, 264),
    ];
    let heads = [
        (1, 1),
        (3, 3),
        (3, 1),
        (8, 2),
        (7, 1),
        (14, 2),
        (4, 1),
        (6, 2),
    ];
    for (i, (k_dim, v_dim)) in sizes.into_iter().enumerate() {
        let (heads, kv_heads) = heads[i];
        let model = Model::new("paper")
            .dims(k_dim, v_dim)
            .heads(heads, kv_heads);
        check(model, RULES, 161 + 7 * i);
    }
}

#[test]
fn every_number_of_bits() {
    for (k_bits, v_bits) in [
        (2, 2),
        (2, 3),
        (3, 2),
        (3, 3),
        (4, 2),
        (4, 4),
        (2, 8),
        (8, 4),
        (8, 8),
    ] {
        let options = format!("paper,k_bits={k_bits},v_bits={v_bits}");
        let rules = Rules {
            k_bits,
            v_bits,
            ..RULES
        };
        check(Model::new(&options).dims(80, 96), rules, 300);
    }
}

#[test]
fn every_dtype() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        check(Model::new("paper").dtype(dtype), RULES, 200);
        check(Model::new("paper").dtype(dtype).dims(128, 128), RULES, 293);
    }
}

#[test]
fn other_groups_windows_and_pools() {
    for (group, residual, outliers, extra) in [
        (32, 0, 1, 0),
        (32, 32, 16, 254),
        (64, 32, 5, 7),
        (128, 128, 2, 1),
        (128, 0, 3, 32),
    ] {
        let options =
            format!("paper,group={group},residual={residual},outliers={outliers},extra={extra}");
        let rules = Rules {
            group,
            residual,
            outliers,
            extra,
            ..RULES
        };
        check(Model::new(&options), rules, 450);
    }
    let options = "paper,group=64,exempt_layers=0";
    check(
        Model::new(options),
        Rules {
            group: 64,
            exempt_layers: 0,
            ..RULES
        },
        300,
    );
    let kivi = Rules {
        residual: 128,
        outliers: 0,
        ..RULES
    };
    check(Model::new("kivi"), kivi, 300);
}

#[test]
fn boosted_keys_and_rotated_values() {
    let settings = [
        (2, 12, false),
        (2, 0, true),
        (2, 12, true),
        (2, 32, true),
        (3, 12, true),
        (4, 12, false),
    ];
    for (k_bits, boost, rotate) in settings {
        let v = if rotate { "v" } else { "none" };
        let options = format!("paper,k_bits={k_bits},boost={boost},rotate={v}");
        let rules = Rules {
            k_bits,
            boost,
            rotate,
            ..RULES
        };
        for (k_dim, v_dim) in [(64, 64), (80, 96), (128, 136)] {
            check(Model::new(&options).dims(k_dim, v_dim), rules, 450);
        }
    }
}

#[test]
fn several_thousand_tokens() {
    check(Model::new("paper").heads(2, 1), RULES, 3000);
}

#[test]
fn softcap() {
    let mut model = Model::new("paper");
    model.attn.softcap = Some(2.5);
    check(model, RULES, 200);
}

/// Several new tokens in one decode step attend causally. Whatever of them is sealed by the step is
/// read as the reference reads it after the step, or as it was before (both are right: rule 5).
#[test]
fn several_tokens_in_one_decode_step() {
    let host = Model::new("paper").host(12);
    let mut s = host.sequence(1, &text(11), &[3, 1, 7]);
    host.step(&mut s, 140, true).unwrap();
    let out = host.step(&mut s, 5, false).unwrap(); // 145 tokens: nothing is sealed.
    for layer in 0..3 {
        let [q, _, _] = host.model.qkv(&s.text, layer, 140, 145);
        let (q, out) = (
            rows(&q).unwrap(),
            rows(out[layer].as_ref().unwrap()).unwrap(),
        );
        for (h, t) in (0..6).flat_map(|h| (0..5).map(move |t| (h, t))) {
            let head = host
                .model
                .reference(RULES, &s.text, (layer, h / 3), 141 + t);
            let want = head.attend(&q[h][t], host.model.attn.scale, None);
            near(
                &out[h][t],
                &want,
                F32,
                &format!("layer {layer}, head {h}, token {t}"),
            );
        }
    }
}

/// Tensors come as views: transposed, or narrow parts of larger ones.
#[test]
fn views_are_read_as_they_look() {
    let view = |x: &Tensor, how: usize| match how {
        0 => x
            .transpose(1, 2)
            .unwrap()
            .contiguous()
            .unwrap()
            .transpose(1, 2)
            .unwrap(),
        1 => x
            .transpose(2, 3)
            .unwrap()
            .contiguous()
            .unwrap()
            .transpose(2, 3)
            .unwrap(),
        _ => {
            let wide = Tensor::cat(&[x, x, x], 3).unwrap();
            wide.narrow(3, x.dim(3).unwrap(), x.dim(3).unwrap())
                .unwrap()
        }
    };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let model = Model::new("paper").dtype(dtype);
        let answers: Vec<Vec<f32>> = [None, Some(0), Some(1), Some(2)]
            .map(|how| {
                let host = model.host(8);
                let mut s = host.sequence(1, &text(13), &[1, 2]);
                let seen = |x: &Tensor| how.map_or(x.clone(), |how| view(x, how));
                let mut answers = vec![];
                for (new, prompt) in [(170, true), (1, false)] {
                    let step = host.begin(prompt, &[(&s, new)]).unwrap();
                    for layer in 0..3 {
                        let [q, k, v] = model
                            .qkv(&s.text, layer, s.past, s.past + new)
                            .map(|x| seen(&x));
                        if prompt {
                            let out = step.prefill(layer, &q, &k, &v, model.attn).unwrap();
                            answers.extend(out.iter().flat_map(harness::numbers));
                            step.append(layer, &q, &k, &v).unwrap();
                        } else {
                            let out = step.decode(layer, &q, &k, &v, model.attn).unwrap();
                            answers.extend(harness::numbers(&out));
                        }
                    }
                    assert_eq!(host.cache.end_step().unwrap(), []);
                    s.past += new;
                }
                answers
            })
            .into();
        assert!(answers.iter().all(|a| *a == answers[0]), "{dtype:?}");
    }
}

/// Clipped key ranges (the default) must not lose what unclipped ones have: stored keys are nearer
/// to the original, summed over a head; values are the same.
#[test]
fn clipped_keys_are_nearer() {
    let stored = |options: &str| {
        let host = Model::new(options).host(8);
        let mut s = host.sequence(1, &text(14), &[1, 2, 3]);
        host.step(&mut s, 300, true).unwrap();
        let original: Vec<Vec<Token>> = (0..2)
            .map(|h| host.model.tokens(&s.text, 2, h, 300))
            .collect();
        (host.past(&s, 2).unwrap(), original)
    };
    let ((clipped, original), (full, _)) = (stored("paper,clip=k"), stored("paper"));
    for h in 0..2 {
        let error = |past: &[Token]| -> f64 {
            let keys = past.iter().zip(&original[h]);
            let channels = keys.flat_map(|(a, b)| a.k.iter().zip(&b.k));
            channels.map(|(a, b)| f64::from(a - b).powi(2)).sum()
        };
        let (clipped_error, full_error) = (error(&clipped[h]), error(&full[h]));
        assert!(
            clipped_error < full_error,
            "{clipped_error} with clip, {full_error} without"
        );
        assert!(clipped[h].iter().zip(&full[h]).all(|(a, b)| a.v == b.v));
    }
}

#[test]
fn a_bad_row_of_eight_ends_alone() {
    harness::a_bad_row_of_eight_ends_alone(Model::new(""));
}

/// A common level of all channels, near the largest that f16 holds, is one large channel once values are rotated. It is
/// read back as it came, from the window and from a page.
#[test]
fn values_of_a_large_common_level_are_served() {
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        for level in [6000.0, -6000.0, 60000.0, -60000.0] {
            let model = Model::new("").dims(128, 128).dtype(dtype);
            let host = model.host(6);
            let mut s = host.sequence(1, &text(1), &[1, 2]);
            let step = host.begin(true, &[(&s, 200)]).unwrap();
            for layer in 0..model.layers {
                let [q, k, v] = model.qkv(&s.text, layer, 0, 200);
                let v = Tensor::full(level as f32, v.shape(), v.device()).unwrap();
                step.append(layer, &q, &k, &v.to_dtype(dtype).unwrap())
                    .unwrap();
            }
            assert_eq!(host.cache.end_step().unwrap(), [], "{dtype:?}, {level}");
            s.past = 200;
            let rounded = if dtype == DType::BF16 { 128.0 } else { 1024.0 };
            for (t, token) in host.past(&s, 2).unwrap()[0].iter().enumerate() {
                // What f16 rounds off the scale and the min of a page adds up in one channel.
                let budget = if t < 128 { 0.1 } else { 1.0 / rounded };
                let near = |x: &f32| (f64::from(*x) / level - 1.0).abs() <= budget;
                assert!(
                    token.v.iter().all(near),
                    "{dtype:?}, {level}: {:?}",
                    token.v
                );
            }
        }
    }
}
