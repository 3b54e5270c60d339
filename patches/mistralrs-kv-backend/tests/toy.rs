//! `toy-f32` against plain softmax attention in f64, and its strictness.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use mistralrs_kv_backend::{toy, KvAttn, KvCacheBackend, KvLayer, KvPlan, KvRow, KvShape};

const BLOCK: usize = 4;
const ATTN: KvAttn = KvAttn {
    scale: 0.3,
    softcap: None,
};

fn shape(dtype: DType, options: &str) -> KvShape {
    let layer = KvLayer {
        num_heads: 6,
        num_kv_heads: 2,
        k_dim: 10,
        v_dim: 7,
        device: Device::Cpu,
    };
    KvShape {
        layers: vec![layer.clone(), layer],
        dtype,
        block_size: BLOCK,
        max_seq_len: 64,
        max_seqs: 4,
        options: options.to_owned(),
    }
}

fn cache(dtype: DType) -> Arc<dyn KvCacheBackend> {
    toy::provider().create(shape(dtype, ""), 32).unwrap()
}

fn row(seq: usize, past: usize, new: usize, blocks: &[usize]) -> KvRow {
    KvRow {
        seq,
        past,
        new,
        blocks: blocks.to_vec(),
    }
}

fn plan(rows: &[KvRow]) -> KvPlan {
    KvPlan {
        prompt: rows[0].new > 1,
        block_size: BLOCK,
        rows: rows.to_vec(),
    }
}

/// Numbers in -1..1 that repeat with no period of the shapes.
fn tensor(seed: usize, dims: [usize; 4], dtype: DType) -> Tensor {
    let count = dims.iter().product::<usize>();
    let numbers = (0..count).map(|i| (((i + 31 * seed) * 7919 % 251) as f32) / 125.5 - 1.0);
    let x = Tensor::from_iter(numbers, &Device::Cpu).unwrap();
    x.reshape(&dims[..]).unwrap().to_dtype(dtype).unwrap()
}

/// Keys and values of `tokens` tokens of one sequence, and queries for all of them.
fn qkv(seed: usize, tokens: usize, dtype: DType) -> [Tensor; 3] {
    [
        tensor(seed, [1, 6, tokens, 10], dtype),
        tensor(seed + 1, [1, 2, tokens, 10], dtype),
        tensor(seed + 2, [1, 2, tokens, 7], dtype),
    ]
}

fn numbers(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).unwrap().contiguous().unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Softmax attention of the last `new` queries, written down naively.
fn naive(q: &Tensor, k: &Tensor, v: &Tensor, new: usize, attn: KvAttn) -> Vec<f64> {
    let (_, heads, tokens, k_dim) = q.dims4().unwrap();
    let (_, kv_heads, _, v_dim) = v.dims4().unwrap();
    let (q, k, v) = (numbers(q), numbers(k), numbers(v));
    let mut out = vec![];
    for h in 0..heads {
        let kv = h / (heads / kv_heads) * tokens;
        for t in tokens - new..tokens {
            let score = |s: usize| {
                let (q, k) = (&q[(h * tokens + t) * k_dim..], &k[(kv + s) * k_dim..]);
                let score = (0..k_dim).map(|c| q[c] * k[c]).sum::<f64>() * f64::from(attn.scale);
                let capped = attn.softcap.map(f64::from);
                capped.map_or(score, |cap| cap * (score / cap).tanh()).exp()
            };
            let weights: Vec<f64> = (0..=t).map(score).collect();
            let sum: f64 = weights.iter().sum();
            for c in 0..v_dim {
                let weighted = weights
                    .iter()
                    .enumerate()
                    .map(|(s, w)| w * v[(kv + s) * v_dim + c]);
                out.push(weighted.sum::<f64>() / sum);
            }
        }
    }
    out
}

/// Append `past` tokens, decode the rest; both layers, which differ in what they hold.
fn decoded(dtype: DType, past: usize, new: usize, attn: KvAttn, sparse: bool) -> Result<()> {
    let cache = cache(dtype);
    let blocks: Vec<usize> = (0..(past + new).div_ceil(BLOCK)).map(|i| 17 - i).collect();
    cache.allocated(9, &blocks);
    for layer in 0..2 {
        let [q, k, v] = qkv(5 * layer, past + new, dtype);
        let tail = |x: &Tensor| {
            let x = x.narrow(2, past, new)?;
            if sparse {
                x.transpose(1, 2)?.contiguous()?.transpose(1, 2)
            } else {
                x.contiguous()
            }
        };
        if past > 0 {
            let step = cache.begin_step(plan(&[row(9, 0, past, &blocks)]))?;
            let new = |x: &Tensor| x.narrow(2, 0, past);
            step.append(layer, &new(&k)?, &new(&k)?, &new(&v)?)?;
        }
        let step = cache.begin_step(plan(&[row(9, past, new, &blocks)]))?;
        let out = step.decode(layer, &tail(&q)?, &tail(&k)?, &tail(&v)?, attn)?;
        assert_eq!((out.dims(), out.dtype()), (&[1, 6, new, 7][..], dtype));
        let budget = match dtype {
            DType::F32 => 1e-6,
            DType::F16 => 1e-3, // rounding of the output alone
            _ => 8e-3,
        };
        for (got, want) in numbers(&out).iter().zip(naive(&q, &k, &v, new, attn)) {
            assert!(
                (got - want).abs() < budget,
                "{dtype:?} {past}+{new}: {got} for {want}"
            );
        }
        if past > 0 {
            let (stored_k, stored_v) = step.past(layer, 0, dtype)?;
            assert_eq!(numbers(&stored_k), numbers(&k.narrow(2, 0, past)?));
            assert_eq!(numbers(&stored_v), numbers(&v.narrow(2, 0, past)?));
        }
    }
    Ok(())
}

#[test]
fn decode_is_softmax_attention() -> Result<()> {
    let softcap = KvAttn {
        softcap: Some(0.5),
        ..ATTN
    };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (past, new) in [
            (0, 1),
            (3, 1),
            (4, 1),
            (15, 1),
            (16, 1),
            (37, 1),
            (0, 5),
            (18, 6),
        ] {
            decoded(dtype, past, new, ATTN, false)?;
            decoded(dtype, past, new, softcap, true)?;
        }
    }
    Ok(())
}

#[test]
fn rows_do_not_mix() -> Result<()> {
    let (alone, batch) = (cache(DType::F32), cache(DType::F32));
    let past = [6, 1, 11];
    let blocks = [&[3, 1][..], &[2], &[6, 4, 5]];
    let pads = past.iter().max().unwrap();
    let prompts: Vec<_> = (0..3).map(|i| qkv(10 * i, *pads, DType::F32)).collect();
    let tokens: Vec<_> = (0..3).map(|i| qkv(10 * i + 50, 1, DType::F32)).collect();
    let together = |xs: &[[Tensor; 3]], i: usize| {
        Tensor::cat(&xs.iter().map(|x| &x[i]).collect::<Vec<_>>(), 0)
    };
    let rows = |new: bool| -> Vec<KvRow> {
        let row = |i: usize| match new {
            true => row(i, past[i], 1, blocks[i]),
            false => row(i, 0, past[i], blocks[i]),
        };
        (0..3).map(row).collect()
    };
    (0..3).for_each(|i| batch.allocated(i, blocks[i]));
    let step = batch.begin_step(plan(&rows(false)))?;
    let (k, v) = (together(&prompts, 1)?, together(&prompts, 2)?);
    step.append(0, &k, &k, &v)?;
    let step = batch.begin_step(plan(&rows(true)))?;
    let [q, k, v] = [0, 1, 2].map(|i| together(&tokens, i).unwrap());
    let out = step.decode(0, &q, &k, &v, ATTN)?;
    for i in 0..3 {
        alone.allocated(i, blocks[i]);
        let step = alone.begin_step(plan(&rows(false)[i..=i]))?;
        step.append(0, &prompts[i][0], &prompts[i][1], &prompts[i][2])?;
        let step = alone.begin_step(plan(&rows(true)[i..=i]))?;
        let one = step.decode(0, &tokens[i][0], &tokens[i][1], &tokens[i][2], ATTN)?;
        assert_eq!(numbers(&one), numbers(&out.narrow(0, i, 1)?));
    }
    Ok(())
}

#[test]
fn a_prefix_hit_reads_the_blocks_of_another_sequence() -> Result<()> {
    let cache = cache(DType::F16);
    let [_, k, v] = qkv(1, 8, DType::F16);
    cache.allocated(1, &[7, 8]);
    cache
        .begin_step(plan(&[row(1, 0, 8, &[7, 8])]))?
        .append(0, &k, &k, &v)?;
    cache.released(1, &[7, 8]);
    cache.allocated(2, &[9]);
    let step = cache.begin_step(plan(&[row(2, 8, 2, &[7, 8, 9])]))?;
    assert_eq!(numbers(&step.past(0, 0, DType::F16)?.0), numbers(&k));
    // In one step with a row that hit nothing.
    cache.allocated(3, &[10]);
    let rows = [row(2, 8, 2, &[7, 8, 9]), row(3, 0, 2, &[10])];
    let (k, v) = cache.begin_step(plan(&rows))?.past(0, 1, DType::F16)?;
    assert_eq!(
        (k.dims(), v.dims()),
        (&[1, 2, 0, 10][..], &[1, 2, 0, 7][..])
    );
    Ok(())
}

/// Without the backtrace that candle adds if `RUST_BACKTRACE` is set.
fn told<T>(result: Result<T>) -> String {
    let text = result
        .err()
        .map_or("no error".to_owned(), |error| error.to_string());
    text.lines().next().unwrap_or_default().to_owned()
}

#[test]
fn misuse_is_an_error() {
    let k = |rows, tokens| tensor(1, [rows, 2, tokens, 10], DType::F32);
    let v = |rows, tokens| tensor(2, [rows, 2, tokens, 7], DType::F32);
    let fresh = cache(DType::F32);
    let begin = |rows: &[KvRow]| told(fresh.begin_step(plan(rows)));
    let mut all = vec![
        begin(&[row(1, 0, 2, &[0])]),
        begin(&[row(1, 0, 2, &[32])]),
        begin(&[row(1, 3, 2, &[1])]),
        begin(&[row(1, 3, 0, &[1])]),
        begin(&[row(1, 0, 1, &[1]), row(1, 0, 1, &[2])]),
    ];
    fresh.allocated(1, &[5]);
    fresh.allocated(2, &[5]);
    all.push(begin(&[row(1, 0, 2, &[5])]));

    let step = fresh.begin_step(plan(&[row(1, 0, 2, &[5])])).unwrap();
    all.push(told(step.append(0, &k(1, 1), &k(1, 1), &v(1, 1))));
    all.push(told(step.append(2, &k(1, 2), &k(1, 2), &v(1, 2))));
    step.append(0, &k(1, 2), &k(1, 2), &v(1, 2)).unwrap();
    let step = fresh.begin_step(plan(&[row(1, 3, 1, &[5])])).unwrap();
    all.push(told(step.past(0, 0, DType::F32)));
    fresh.released(1, &[5]);
    all.push(told(step.append(0, &k(1, 1), &k(1, 1), &v(1, 1))));
    fresh.allocated(1, &[5]);
    let step = fresh.begin_step(plan(&[row(1, 1, 1, &[5])])).unwrap();
    all.push(told(step.past(0, 0, DType::F32)));
    insta::assert_snapshot!(all.join("\n"));
}

#[test]
fn memory_is_what_is_held() -> anyhow::Result<()> {
    let provider = toy::provider();
    let memory = provider.memory(&shape(DType::F32, ""))?;
    let cache = provider.create(shape(DType::F32, ""), 3)?;
    cache.allocated(1, &[1, 2]);
    let [_, k, v] = qkv(1, 8, DType::F32);
    let step = cache.begin_step(plan(&[row(1, 0, 8, &[1, 2])]))?;
    (0..2).try_for_each(|layer| step.append(layer, &k, &k, &v))?;
    let unused = BLOCK * 2 * 4 * 2 * (10 + 7);
    assert_eq!(
        cache.allocated_bytes(),
        3 * memory.per_block + memory.fixed - unused
    );
    cache.reset();
    assert!(cache
        .begin_step(plan(&[row(1, 8, 1, &[1, 2, 1])]))?
        .past(0, 0, DType::F32)
        .is_err());
    Ok(())
}

#[test]
fn options() {
    let toy = toy::provider();
    assert_eq!(toy.block_size(None, "").unwrap(), 128);
    assert_eq!(toy.block_size(None, "block=32").unwrap(), 32);
    assert_eq!(toy.block_size(Some(64), "").unwrap(), 64);
    let told = |options: &str| toy.check_options(options).unwrap_err().to_string();
    insta::assert_snapshot!([
        told("block=0"),
        told("bits=2"),
        toy.block_size(Some(64), "block=32")
            .unwrap_err()
            .to_string(),
        toy::faulty::provider()
            .check_options("fail_layer=x")
            .unwrap_err()
            .to_string(),
    ]
    .join("\n"));
}

#[test]
fn faults_come_as_asked() -> anyhow::Result<()> {
    let fails = |options: &str| -> anyhow::Result<String> {
        let cache = toy::faulty::provider().create(shape(DType::F32, options), 8)?;
        cache.allocated(1, &[1]);
        let [q, k, v] = qkv(1, 1, DType::F32);
        let step = |_| match cache.begin_step(plan(&[row(1, 0, 1, &[1])])) {
            Err(_) => 'b',
            Ok(step) if step.append(0, &k, &k, &v).is_err() => '0',
            Ok(step) if step.decode(1, &q, &k, &v, ATTN).is_err() => '1',
            Ok(_) => '.',
        };
        Ok((0..5).map(step).collect())
    };
    assert_eq!(fails("")?, "b....");
    assert_eq!(fails("fail_after_steps=2,fail_times=2")?, "..bb.");
    assert_eq!(fails("fail_layer=0")?, "0....");
    assert_eq!(
        fails("fail_layer=1,fail_after_steps=1,fail_times=9")?,
        ".1111"
    );
    assert_eq!(fails("fail_times=0")?, ".....");
    Ok(())
}
