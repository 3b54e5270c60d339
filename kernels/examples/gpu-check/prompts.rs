//! Prompts on a GPU or on the shim: the clear kernel against a softmax in f64 over what `gather` reads, the one on tensor
//! cores against both, contexts whole and cut.

use std::sync::Arc;

use anyhow::{ensure, Context, Result};
use cudarc::driver::{CudaSlice, CudaStream};
use half::{bf16, f16};
use ott_kernels::abi::{Fresh, Prompt};
use ott_kernels::blocks::{Blocks, Row, RowPlan};
use ott_kernels::plan::Plan;

use crate::conformance::{shape, spec, Number};
use crate::device::{address, Attention, DeviceLayer, DevicePlan, Dtype, Kernels};
use crate::paint::{keys, queries, values, Noise};

/// Largest difference allowed, relative to an answer's largest number. Clear: sums in f32, values that `gather` rounds once
/// more, one rounding. On tensor cores: weights are rounded too.
const CLEAR: f64 = 8e-4;
const TENSOR: f64 = 1.3e-3;
/// bf16 has three bits less.
const BF16: f64 = 8.0;
/// What f32 may be off by: exponentials are approximate.
const F32: f64 = 1e-4;

struct Case {
    options: &'static str,
    dim: usize,
    kv_heads: usize,
    ratio: usize,
    softcap: f32,
    /// By row: tokens stored, and new ones.
    rows: &'static [(usize, usize)],
}

const fn case(
    options: &'static str,
    dim: usize,
    (kv_heads, ratio): (usize, usize),
    rows: &'static [(usize, usize)],
) -> Case {
    Case {
        options,
        dim,
        kv_heads,
        ratio,
        softcap: 0.0,
        rows,
    }
}

const fn capped(case: Case, softcap: f32) -> Case {
    Case { softcap, ..case }
}

const CASES: [Case; 26] = [
    case("", 128, (2, 4), &[(300, 40), (0, 7), (129, 1)]),
    case("", 64, (2, 7), &[(700, 20), (160, 37), (31, 0)]),
    case("3bit", 128, (1, 8), &[(400, 17), (288, 16)]),
    case("4bit", 128, (1, 4), &[(450, 33), (31, 5)]),
    case("kivi", 64, (1, 1), &[(520, 140)]),
    case("group=32", 64, (1, 4), &[(100, 30), (64, 3)]),
    capped(case("", 128, (1, 1), &[(290, 140)]), 30.0),
    capped(case("k_bits=4", 64, (1, 3), &[(417, 50), (5, 70)]), 5.0),
    case(
        "outliers=16,extra=40,exempt_layers=0",
        64,
        (2, 4),
        &[(500, 9)],
    ),
    case(
        "outliers=16,extra=40,exempt_layers=0,bits=4",
        128,
        (1, 4),
        &[(390, 9)],
    ),
    case("boost=0,rotate=none", 128, (1, 4), &[(384, 64), (415, 2)]),
    case("residual=0", 64, (1, 5), &[(256, 26), (255, 26), (257, 25)]),
    case("k_bits=3,boost=0", 128, (1, 2), &[(287, 65)]),
    case("bits=3,boost=12", 64, (1, 4), &[(333, 33)]),
    case("bits=4,boost=12", 64, (1, 8), &[(333, 16)]),
    case("boost=32,outliers=0", 128, (1, 4), &[(289, 32)]),
    case("boost=13", 128, (1, 3), &[(289, 3)]),
    case("group=32,residual=32,bits=8", 96, (2, 2), &[(200, 20)]),
    capped(case("group=64", 256, (1, 2), &[(300, 12), (64, 5)]), 20.0),
    case("", 128, (8, 4), &[(4133, 515), (900, 33), (0, 200)]),
    case("", 64, (4, 4), &[(16000, 130), (300, 700)]),
    case("", 128, (1, 7), &[(9000, 70)]),
    case("3bit", 64, (2, 8), &[(3000, 1000)]),
    case("4bit", 64, (2, 4), &[(3000, 400), (2000, 17)]),
    case("4bit", 128, (8, 1), &[(3000, 300)]),
    case("kivi", 128, (2, 4), &[(2049, 300), (3000, 1)]),
];
/// Those before are for the shim too.
const SHORT: usize = 19;

/// All cases, or the short ones.
///
/// # Errors
/// If a kernel is off, or the driver fails.
pub fn judge(kernels: &Kernels, short: bool, dtypes: &[Dtype]) -> Result<()> {
    for case in &CASES[..if short { SHORT } else { CASES.len() }] {
        for dtype in dtypes {
            match dtype {
                Dtype::F16 => check::<f16>(kernels, case, *dtype)?,
                Dtype::Bf16 => check::<bf16>(kernels, case, *dtype)?,
                Dtype::F32 => check::<f32>(kernels, case, *dtype)?,
            }
        }
    }
    Ok(())
}

/// New tokens of all rows, `(rows, tokens, heads, dim)`, as models have them.
struct NewTokens<E> {
    numbers: Vec<E>,
    device: CudaSlice<E>,
    heads: usize,
    tokens: usize,
    dim: usize,
}

impl<E: Number> NewTokens<E> {
    /// From `(rows, heads, tokens, dim)`.
    fn new(
        painted: &[f16],
        (heads, tokens, dim): (usize, usize, usize),
        stream: &Arc<CudaStream>,
    ) -> Result<Self> {
        let mut numbers = Vec::with_capacity(painted.len());
        for row in painted.chunks(heads * tokens * dim) {
            for t in 0..tokens {
                for head in row.chunks(tokens * dim) {
                    let of = &head[t * dim..(t + 1) * dim];
                    numbers.extend(of.iter().map(|x| E::of(x.to_f32())));
                }
            }
        }
        Ok(Self {
            device: stream.clone_htod(&numbers)?,
            numbers,
            heads,
            tokens,
            dim,
        })
    }

    fn fresh(&self, stream: &Arc<CudaStream>) -> Fresh {
        Fresh {
            data: address(&self.device, stream),
            row: (self.tokens * self.heads * self.dim) as i64,
            head: self.dim as i64,
            token: (self.heads * self.dim) as i64,
        }
    }

    fn of(&self, row: usize, head: usize, token: usize) -> &[E] {
        let at = ((row * self.tokens + token) * self.heads + head) * self.dim;
        &self.numbers[at..at + self.dim]
    }
}

/// A layer with what is stored, and a step that has begun.
struct Begun {
    layer: DeviceLayer,
    plan: DevicePlan,
    rows: Vec<RowPlan>,
}

/// Store every row's past, in two steps.
fn begin<E: Number>(
    kernels: &Kernels,
    case: &Case,
    dtype: Dtype,
    noise: &mut Noise,
) -> Result<Begun> {
    let spec = spec(case.options, case.kv_heads, case.dim)?;
    let (heads, dim, group) = (case.kv_heads, case.dim, spec.config.group_size);
    let stream = kernels.stream();
    let of_row = |(past, new): &(usize, usize)| (past + new).div_ceil(group).max(1);
    let blocks: usize = 1 + case.rows.iter().map(of_row).sum::<usize>();
    let chunks = case.rows.len() * (2 * group + spec.config.residual).div_ceil(32);
    let num_heads = heads * case.ratio;
    let layer = DeviceLayer::new(kernels, shape(&spec), dtype, num_heads, blocks, chunks)?;
    let mut states = Blocks::new(blocks, chunks, group, spec.config.residual);
    // The last block first.
    let mut ids: Vec<usize> = (1..blocks).collect();
    let tables = case
        .rows
        .iter()
        .map(|row| ids.split_off(ids.len() - of_row(row)));
    let tables: Vec<Vec<usize>> = tables.collect();
    let (lanes, slots) = layer.lanes_and_slots();
    let upload =
        |rows: &[RowPlan]| DevicePlan::upload(&Plan::new(rows, group, lanes, slots), lanes, stream);
    let seal = |wave: &[RowPlan]| {
        let nothing = Fresh::NOTHING;
        layer.append(&upload(wave)?, nothing, nothing, nothing)
    };
    let rows = |past: &dyn Fn(usize) -> usize, new: &dyn Fn(usize) -> usize| -> Vec<Row<'_>> {
        let row = |seq: usize| Row {
            seq,
            past: past(seq),
            new: new(seq),
            table: &tables[seq],
        };
        (0..tables.len()).map(row).collect()
    };
    let past = |r: usize| case.rows[r].0;
    for (from, to) in [(0, 1), (1, 2)] {
        let new = |r: usize| past(r) * to / 2 - past(r) * from / 2;
        let tokens = (0..tables.len()).map(new).max().unwrap_or(0);
        let paint = |noise: &mut Noise, of: &dyn Fn(&mut Noise) -> Vec<f16>| {
            let all = (0..tables.len())
                .flat_map(|_| of(noise))
                .collect::<Vec<_>>();
            NewTokens::<E>::new(&all, (heads, tokens, dim), stream)
        };
        let k = paint(noise, &|noise| keys(noise, heads, tokens, dim))?;
        let v = paint(noise, &|noise| values(noise, heads * tokens * dim))?;
        let begun = states.begin(&rows(&|r| past(r) * from / 2, &new), seal)?;
        let plan = upload(&begun)?;
        layer.append(&plan, Fresh::NOTHING, k.fresh(stream), v.fresh(stream))?;
        ensure!(plan.faults(stream)?.iter().all(Option::is_none), "a fault");
        states.end(|_| false);
    }
    let begun = states.begin(&rows(&past, &|r| case.rows[r].1), seal)?;
    Ok(Begun {
        plan: upload(&begun)?,
        layer,
        rows: begun,
    })
}

/// A row's past as `gather` reads it: keys and values, `(kv_heads, past, dim)`.
fn stored<E: Number>(
    begun: &Begun,
    row: usize,
    stream: &Arc<CudaStream>,
) -> Result<(Vec<E>, Vec<E>)> {
    let shape = &begun.layer.shape;
    let past = begun.rows[row].past;
    let nan = || {
        stream.clone_htod(&vec![
            E::of(f32::NAN);
            shape.num_kv_heads * past * shape.k_dim
        ])
    };
    let (k, v) = (nan()?, nan()?);
    if past > 0 {
        let to = (address(&k, stream), address(&v, stream));
        let gathered = begun
            .layer
            .gather(&begun.plan, row as u32, 0..past as u32, to.0, to.1);
        gathered?;
    }
    Ok((stream.clone_dtoh(&k)?, stream.clone_dtoh(&v)?))
}

/// The softmax in f64 of one query over `(key, value)`.
fn softmax<'a, E: Number>(
    q: &[E],
    case: &Case,
    tokens: impl Iterator<Item = (&'a [E], &'a [E])> + Clone,
) -> Vec<f64> {
    let scale = 1.0 / (case.dim as f64).sqrt();
    let score = |k: &[E]| {
        let pairs = q.iter().zip(k);
        let dot: f64 = pairs
            .map(|(q, k)| f64::from(q.wide()) * f64::from(k.wide()))
            .sum();
        match f64::from(case.softcap) {
            0.0 => dot * scale,
            cap => cap * (dot * scale / cap).tanh(),
        }
    };
    let scores: Vec<f64> = tokens.clone().map(|(k, _)| score(k)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut out = vec![0.0; case.dim];
    let mut sum = 0.0;
    for (score, (_, v)) in scores.into_iter().zip(tokens) {
        let weight = (score - max).exp();
        sum += weight;
        out.iter_mut()
            .zip(v)
            .for_each(|(o, v)| *o += weight * f64::from(v.wide()));
    }
    out.iter_mut().for_each(|o| *o /= sum);
    out
}

/// Answers `(rows, num_heads, tokens, dim)`, zero where there is no token; a thread for each query head.
fn expected<E: Number>(
    begun: &Begun,
    case: &Case,
    [q, k, v]: [&NewTokens<E>; 3],
    stream: &Arc<CudaStream>,
) -> Result<Vec<f64>> {
    let dim = case.dim;
    let mut all = Vec::new();
    for (r, row) in begun.rows.iter().enumerate() {
        let (past_k, past_v) = stored::<E>(begun, r, stream)?;
        let of_head = |head: usize| {
            let kv = head / case.ratio;
            let part = kv * row.past * dim..(kv + 1) * row.past * dim;
            let (k_part, v_part) = (&past_k[part.clone()], &past_v[part]);
            let past = k_part.chunks(dim).zip(v_part.chunks(dim));
            let answer = |t: usize| {
                let new = (0..=t).map(|t| (k.of(r, kv, t), v.of(r, kv, t)));
                softmax(q.of(r, head, t), case, past.clone().chain(new))
            };
            let mut answers: Vec<f64> = (0..row.new).flat_map(answer).collect();
            answers.resize(q.tokens * dim, 0.0);
            answers
        };
        std::thread::scope(|scope| {
            let of_head = &of_head;
            let spawn = |head| scope.spawn(move || of_head(head));
            let threads: Vec<_> = (0..q.heads).map(spawn).collect();
            for thread in threads {
                all.extend(thread.join().expect("a softmax does not panic"));
            }
        });
    }
    Ok(all)
}

/// The largest difference, relative to an answer's largest number.
fn difference(expected: &[f64], found: &[f64], dim: usize) -> Result<f64> {
    let mut worst = 0f64;
    for (i, (e, f)) in expected.chunks(dim).zip(found.chunks(dim)).enumerate() {
        let largest = e.iter().fold(0f64, |m, x| m.max(x.abs()));
        for (c, (e, f)) in e.iter().zip(f).enumerate() {
            ensure!(f.is_finite(), "answer {i}, channel {c} is {f}, not {e}");
            ensure!(
                largest > 0.0 || *f == 0.0,
                "an answer without a token is not 0"
            );
            worst = worst.max((e - f).abs() / largest.max(f64::MIN_POSITIVE));
        }
    }
    Ok(worst)
}

fn check<E: Number>(kernels: &Kernels, case: &Case, dtype: Dtype) -> Result<()> {
    let stream = kernels.stream();
    let mut noise = Noise::new(case.dim as u64 + case.rows[0].0 as u64);
    let begun = begin::<E>(kernels, case, dtype, &mut noise)?;
    let (heads, dim, rows) = (case.kv_heads, case.dim, case.rows.len());
    let num_heads = heads * case.ratio;
    let tokens = case.rows.iter().map(|row| row.1).max().context("a row")?;
    let painted = queries(&mut noise, rows * num_heads, tokens, dim);
    let q = NewTokens::<E>::new(&painted, (num_heads, tokens, dim), stream)?;
    let painted = keys(&mut noise, rows * heads, tokens, dim);
    let k = NewTokens::<E>::new(&painted, (heads, tokens, dim), stream)?;
    let painted = values(&mut noise, rows * heads * tokens * dim);
    let v = NewTokens::<E>::new(&painted, (heads, tokens, dim), stream)?;
    let exact = expected(&begun, case, [&q, &k, &v], stream)?;
    let attend = |kernel, splits| -> Result<Vec<f64>> {
        let out = stream.clone_htod(&vec![E::of(f32::NAN); exact.len()])?;
        let prompt = Prompt {
            q: q.fresh(stream),
            k: k.fresh(stream),
            v: v.fresh(stream),
            out: address(&out, stream),
            sums: 0,
            tokens: tokens as u32,
            splits: 1,
            scale: std::f32::consts::LOG2_E / (dim as f32).sqrt(),
            softcap: case.softcap,
        };
        match kernel {
            // As the backend calls it.
            None => begun.layer.prompt(&begun.plan, prompt)?,
            Some(kernel) => begun.layer.prompt_by(kernel, &begun.plan, prompt, splits)?,
        }
        let out = stream.clone_dtoh(&out)?;
        Ok(out.iter().map(|x| f64::from(x.wide())).collect())
    };
    let clear = attend(Some(Attention::Clear), None)?;
    let named = |kernel: &str| {
        format!(
            "{kernel} kernel, {:?} head {dim} gqa {} {dtype:?} {:?}",
            case.options, case.ratio, case.rows
        )
    };
    let off = difference(&exact, &clear, dim).with_context(|| named("clear"))?;
    let is_tuned = begun.layer.is_tuned_for_prompts();
    let mut tensor = 0f64;
    for splits in [None, Some(1), Some(3)].iter().filter(|_| is_tuned) {
        let kernel = splits.map(|_| Attention::Narrow);
        let found = attend(kernel, *splits)?;
        for other in [&exact, &clear] {
            let parts = || named(&format!("tensor-core ({splits:?} parts)"));
            tensor = tensor.max(difference(other, &found, dim).with_context(parts)?);
        }
    }
    println!(
        "prompt {:40} head {dim:3} gqa {} {dtype:?} {:?}: error {off:.1e} clear, {tensor:.1e} tensor",
        case.options, case.ratio, case.rows
    );
    let budget = |of: f64| match dtype {
        Dtype::F16 => of,
        Dtype::Bf16 => of * BF16,
        Dtype::F32 => F32,
    };
    ensure!(off <= budget(CLEAR), "the clear kernel is off by {off}");
    ensure!(
        tensor <= budget(TENSOR),
        "the tensor-core kernel is off by {tensor}"
    );
    Ok(())
}
