//! Attention of a prompt's new tokens to stored ones and to each other, by products of tensors, where no kernel does it:
//! on a GPU. One online softmax over tiles of keys, so that what it holds is bounded whatever the length of the past, and
//! no mask is made for the past.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor, D};
use mistralrs_kv_backend::KvAttn;

/// Keys of a tile.
const TILE: usize = 2048;
/// Scores that are made at once, at most: over all query heads.
const SCORES: usize = 1 << 24;
/// Bytes of a score, with what is made of it (in the model's dtype and in f32, before and after `exp`, and as weights) and what
/// the allocator rounds up.
const SCORE_BYTES: usize = 24;

/// Bytes that [`attend`] holds at most, beside a row's queries and its answer, of layers of `kv_heads` and these dims.
pub fn scratch_bytes(kv_heads: usize, width: usize, size: usize) -> usize {
    // A tile's keys and values as they are gathered, turned and transposed.
    SCORES * SCORE_BYTES + 3 * TILE * kv_heads * width * size
}

/// `q (heads, new, k_dim)` over `past` stored tokens and the new `k (kv_heads, new, k_dim)` and `v`; `stored(range)` reads
/// some of the stored ones, `(kv_heads, tokens, dim)` each. The answer is `(heads, new, v_dim)` in q's dtype.
///
/// # Errors
/// Those of candle, or of `stored`.
pub fn attend(
    q: &Tensor,
    (k, v): (&Tensor, &Tensor),
    past: usize,
    attn: KvAttn,
    stored: impl Fn(Range<usize>) -> Result<(Tensor, Tensor)>,
) -> Result<Tensor> {
    let (heads, new, k_dim) = q.dims3()?;
    let kv_heads = k.dim(0)?;
    let ratio = heads / kv_heads;
    let piece = (SCORES / (heads * TILE)).clamp(1, new.max(1));
    let mut answers = Vec::new();
    for from in (0..new).step_by(piece) {
        let count = piece.min(new - from);
        let q = (q.narrow(1, from, count)? * f64::from(attn.scale))?;
        let q = q.contiguous()?.reshape((kv_heads, ratio * count, k_dim))?;
        let mut sums = Sums::default();
        for tile in tiles(0..past) {
            let (k, v) = stored(tile)?;
            sums.add(&q, &k, &v, attn, None)?;
        }
        for tile in tiles(0..from + count) {
            let of = |x: &Tensor| x.narrow(1, tile.start, tile.len());
            // Only tiles that reach beyond the first query need a mask.
            let mask = (tile.end > from + 1).then(|| mask(from..from + count, &tile, q.device()));
            sums.add(&q, &of(k)?, &of(v)?, attn, mask.transpose()?.as_ref())?;
        }
        let answer = sums.finish()?.to_dtype(q.dtype())?;
        let v_dim = answer.dim(D::Minus1)?;
        answers.push(answer.reshape((heads, count, v_dim))?);
    }
    Tensor::cat(&answers, 1)
}

fn tiles(all: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = all.end;
    all.step_by(TILE)
        .map(move |from| from..(from + TILE).min(end))
}

/// `(queries, keys)`: 0 where a query may look, minus infinity where it may not.
fn mask(queries: Range<usize>, keys: &Range<usize>, device: &Device) -> Result<Tensor> {
    let line = |range: &Range<usize>| Tensor::arange(range.start as u32, range.end as u32, device);
    let (rows, columns) = (line(&queries)?.unsqueeze(1)?, line(keys)?.unsqueeze(0)?);
    let seen = columns.broadcast_le(&rows)?;
    let shape = seen.dims2()?;
    let hidden = Tensor::full(f32::NEG_INFINITY, shape, device)?;
    seen.where_cond(&Tensor::zeros(shape, DType::F32, device)?, &hidden)
}

/// Softmaxes over the tiles so far, not divided by their sums yet: `(kv_heads, queries, 1)` twice, and `(kv_heads, queries,
/// v_dim)`.
#[derive(Default)]
struct Sums(Option<(Tensor, Tensor, Tensor)>);

impl Sums {
    fn add(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
        mask: Option<&Tensor>,
    ) -> Result<()> {
        let keys = k.transpose(1, 2)?.contiguous()?;
        let mut scores = q.matmul(&keys)?.to_dtype(DType::F32)?;
        if let Some(softcap) = attn.softcap.map(f64::from) {
            scores = ((scores / softcap)?.tanh()? * softcap)?;
        }
        if let Some(mask) = mask {
            let (kv_heads, queries, tokens) = scores.dims3()?;
            let ratio = queries / mask.dim(0)?;
            let by_token = scores.reshape((kv_heads * ratio, mask.dim(0)?, tokens))?;
            scores = by_token
                .broadcast_add(mask)?
                .reshape((kv_heads, queries, tokens))?;
        }
        let mut max = scores.max_keepdim(D::Minus1)?;
        if let Some((before, ..)) = &self.0 {
            max = max.maximum(before)?;
        }
        let weights = scores.broadcast_sub(&max)?.exp()?;
        let mut sum = weights.sum_keepdim(D::Minus1)?;
        // Weights that add up to 1, so that their product with values is inside f16; a query may see nothing of a tile.
        let shares = weights.broadcast_div(&sum.maximum(f64::from(f32::MIN_POSITIVE))?)?;
        let values = shares.to_dtype(v.dtype())?.matmul(&v.contiguous()?)?;
        let mut out = values.to_dtype(DType::F32)?.broadcast_mul(&sum)?;
        if let Some((before, sum_before, out_before)) = self.0.take() {
            let shrink = (before - &max)?.exp()?;
            sum = (sum + (sum_before * &shrink)?)?;
            out = (out + out_before.broadcast_mul(&shrink)?)?;
        }
        self.0 = Some((max, sum, out));
        Ok(())
    }

    fn finish(self) -> Result<Tensor> {
        match self.0 {
            Some((_, sum, out)) => out.broadcast_div(&sum),
            None => candle_core::bail!("a row without tokens"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64, shape: (usize, usize, usize)) -> Tensor {
        let count = shape.0 * shape.1 * shape.2;
        let number = |i: usize| {
            let x = (i as u64 + 1)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .wrapping_add(seed << 17);
            let x = (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let numbers: Vec<f32> = (0..count).map(number).collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu).expect("a tensor")
    }

    /// The softmax in f64, one query after the other.
    fn plainly(q: &Tensor, k: &Tensor, v: &Tensor, past: usize, attn: KvAttn) -> Vec<f64> {
        let all = |x: &Tensor| x.to_vec3::<f32>().expect("numbers");
        let (q, k, v) = (all(q), all(k), all(v));
        let ratio = q.len() / k.len();
        let mut out = Vec::new();
        for (h, head) in q.iter().enumerate() {
            for (i, query) in head.iter().enumerate() {
                let (keys, values) = (&k[h / ratio][..=past + i], &v[h / ratio]);
                let score = |key: &Vec<f32>| {
                    let dot: f64 = key.iter().zip(query).map(|(a, b)| f64::from(a * b)).sum();
                    let score = dot * f64::from(attn.scale);
                    attn.softcap
                        .map_or(score, |c| f64::from(c) * (score / f64::from(c)).tanh())
                };
                let weights: Vec<f64> = keys.iter().map(|key| score(key).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for c in 0..values[0].len() {
                    let sums = weights.iter().zip(values).map(|(w, v)| w * f64::from(v[c]));
                    out.push(sums.sum::<f64>() / sum);
                }
            }
        }
        out
    }

    #[test]
    fn scratch_is_bounded_whatever_the_past() {
        // Llama 3 8B in f16.
        assert_eq!(scratch_bytes(8, 256, 2) >> 20, 408);
    }

    /// 2048 equal weights times a value must not pass through a sum that f16 cannot hold.
    #[test]
    fn large_values_stay_inside_f16() {
        let of = |x: f64, tokens: usize| {
            let x = Tensor::full(x as f32, (1, tokens, 8), &Device::Cpu);
            x.and_then(|x| x.to_dtype(DType::F16)).expect("a tensor")
        };
        let attn = KvAttn {
            scale: 1.0,
            softcap: None,
        };
        let stored = |r: Range<usize>| Ok((of(0.0, r.len()), of(1000.0, r.len())));
        let new = (&of(0.0, 1), &of(1000.0, 1));
        let out = attend(&of(0.0, 1), new, TILE, attn, stored).expect("attended");
        let out = out
            .to_dtype(DType::F32)
            .and_then(|x| x.flatten_all()?.to_vec1::<f32>());
        // Adding 2048 shares in f16 loses some percent.
        assert!(out
            .expect("numbers")
            .iter()
            .all(|x| (x / 1000.0 - 1.0).abs() < 0.3));
    }

    #[test]
    fn is_a_softmax_over_past_and_new_tokens() {
        for (past, new, softcap) in [
            (1, 1, None),
            (300, 70, None),
            (TILE + 5, 40, Some(2.0)),
            (0, TILE + 30, None),
        ] {
            let (heads, kv_heads, dim) = (4, 2, 8);
            let attn = KvAttn {
                scale: 0.6,
                softcap,
            };
            let q = noise(1, (heads, new, dim));
            let (k, v) = (
                noise(2, (kv_heads, past + new, dim)),
                noise(3, (kv_heads, past + new, 16)),
            );
            let newest = |x: &Tensor| x.narrow(1, past, new).expect("inside");
            let stored = |r: Range<usize>| {
                Ok((
                    k.narrow(1, r.start, r.len())?,
                    v.narrow(1, r.start, r.len())?,
                ))
            };
            let out = attend(&q, (&newest(&k), &newest(&v)), past, attn, stored).expect("attended");
            assert_eq!(out.dims(), [heads, new, 16]);
            let out = out
                .flatten_all()
                .and_then(|x| x.to_vec1::<f32>())
                .expect("numbers");
            for (got, want) in out.iter().zip(plainly(&q, &k, &v, past, attn)) {
                assert!(
                    (f64::from(*got) - want).abs() < 2e-5,
                    "{past} + {new}: {got} for {want}"
                );
            }
        }
    }
}
