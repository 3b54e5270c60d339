//! Sealing: full-precision groups in, the bytes of pages out. Pure: nothing is stored here.

use rayon::prelude::*;

use super::element::Element;
use super::trace::TraceState;
use super::CHUNK;
use crate::config::{Clip, OttConfig, Weigh};
use crate::cpu::CpuOps;
use crate::error::{Error, Result};
use crate::layout::{put_f16, PageLayout};
use crate::pack::{pack, pack_bits, packed_len};
use crate::quantize::{squared_error, stretched, Affine, Spread};
use crate::weigh::{Weights, SAMPLED};

/// What never changes about a layer.
#[derive(Clone, Debug)]
pub struct LayerSpec {
    /// Its index.
    pub layer: usize,
    /// Settings.
    pub config: OttConfig,
    /// Its pages.
    pub layout: PageLayout,
    /// The inner loops.
    pub ops: &'static CpuOps,
}

impl LayerSpec {
    /// Chunks of the window: a sequence's tokens that are in no page are fewer than G + R.
    pub fn chunks(&self, max_seqs: usize) -> usize {
        max_seqs.saturating_mul((self.layout.group_size + self.config.residual) / CHUNK)
    }
}

/// One head's part of a page that was just made.
#[derive(Clone, Debug, PartialEq)]
pub struct SealedHead {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Places of the traced tokens in the group, ascending.
    pub traced: Vec<u8>,
}

/// Seal `count` groups that follow each other, from group `first` of their sequence on.
///
/// `before` is the tracing state of each head before the first one, `source(position, head)` the
/// key and value of a token, `sample(place, head)` what is kept of the queries of token
/// `(place + 1) * SAMPLED - 1`; it is asked only if keys are weighed by them. The result is by group,
/// then by head.
///
/// # Errors
/// If a number is not finite or beyond f16.
pub fn seal_groups<'a, E: Element>(
    spec: &LayerSpec,
    (first, count): (usize, usize),
    before: &[TraceState],
    source: &(impl Fn(usize, usize) -> (&'a [E], &'a [E]) + Sync),
    sample: &(impl Fn(usize, usize) -> &'a [E] + Sync),
) -> Result<Vec<Vec<SealedHead>>> {
    let heads = spec.layout.num_kv_heads;
    let chains: Vec<Vec<(TraceState, Vec<u8>)>> = (0..heads)
        .into_par_iter()
        .map(|head| trace_chain(spec, head, (first, count), &before[head], source))
        .collect::<Result<_>>()?;
    let parts = (0..count * heads).into_par_iter().map(|i| {
        let (group, head) = (i / heads, i % heads);
        let (state, traced) = &chains[head][group];
        let start = (first + group) * spec.layout.group_size;
        let weights = weights(spec, |i| sample(start / SAMPLED + i, head));
        let token = |t| source(start + t, head);
        let bytes = quantize_head(spec, head, traced, state, weights.as_ref(), &token)?;
        Ok(SealedHead {
            bytes,
            traced: traced.clone(),
        })
    });
    let mut parts = parts.collect::<Result<Vec<_>>>()?.into_iter();
    Ok((0..count)
        .map(|_| parts.by_ref().take(heads).collect())
        .collect())
}

/// The tracing state after each group, and the tokens that are traced in it.
fn trace_chain<'a, E: Element>(
    spec: &LayerSpec,
    head: usize,
    (first, count): (usize, usize),
    before: &TraceState,
    source: &(impl Fn(usize, usize) -> (&'a [E], &'a [E]) + Sync),
) -> Result<Vec<(TraceState, Vec<u8>)>> {
    let group = spec.layout.group_size;
    if spec.layout.outliers == 0 {
        return Ok(vec![(before.clone(), Vec::new()); count]);
    }
    let mut key = vec![0f32; spec.layout.k_dim];
    let mut state = before.clone();
    let mut chain = Vec::with_capacity(count);
    for i in first..first + count {
        let magnitudes: Vec<f32> = (i * group..(i + 1) * group)
            .map(|position| {
                E::widen(source(position, head).0, &mut key);
                (spec.ops.l1_norm)(&key)
            })
            .collect();
        if !magnitudes.iter().all(|m| m.is_finite()) {
            return Err(not_representable(spec, "key", head));
        }
        let (after, traced) = state.trace(&magnitudes, spec.config.extra);
        state = after.clone();
        chain.push((after, traced));
    }
    Ok(chain)
}

/// One head's part of a page; `token(t)` is the key and value of the group's token `t`.
fn quantize_head<'a, E: Element>(
    spec: &LayerSpec,
    head: usize,
    traced: &[u8],
    state: &TraceState,
    weights: Option<&Weights>,
    token: &impl Fn(usize) -> (&'a [E], &'a [E]),
) -> Result<Vec<u8>> {
    let layout = &spec.layout;
    let mut bytes = vec![0u8; layout.head_bytes];
    let (k, v) = tiles(layout, traced, token);
    quantize_keys(spec, traced, weights, &k, &mut bytes)
        .ok_or_else(|| not_representable(spec, "key", head))?;
    quantize_values(spec, &v, &mut bytes).ok_or_else(|| not_representable(spec, "value", head))?;
    state.write(traced, layout, &mut bytes);
    Ok(bytes)
}

/// What errors of the group's keys count; `sample(i)` is its `i`-th sample.
fn weights<'a, E: Element>(spec: &LayerSpec, sample: impl Fn(usize) -> &'a [E]) -> Option<Weights> {
    if spec.config.weigh == Weigh::None {
        return None;
    }
    let k_dim = spec.layout.k_dim;
    let mut wide = vec![0f32; spec.layout.group_size / SAMPLED * 2 * k_dim];
    for (i, wide) in wide.chunks_exact_mut(2 * k_dim).enumerate() {
        E::widen(sample(i), wide);
    }
    Weights::of(wide.chunks_exact(2 * k_dim), k_dim)
}

/// Keys `(k_dim, G)` and values `(G, v_dim)` of a group, traced tokens replaced by the mean.
fn tiles<'a, E: Element>(
    layout: &PageLayout,
    traced: &[u8],
    token: &impl Fn(usize) -> (&'a [E], &'a [E]),
) -> (Vec<f32>, Vec<f32>) {
    let (group, k_dim, v_dim) = (layout.group_size, layout.k_dim, layout.v_dim);
    let mut keys = vec![0f32; group * k_dim];
    let mut v = vec![0f32; group * v_dim];
    for t in 0..group {
        let (key, value) = token(t);
        E::widen(key, &mut keys[t * k_dim..][..k_dim]);
        E::widen(value, &mut v[t * v_dim..][..v_dim]);
    }
    replace_by_mean(&mut keys, k_dim, traced);
    replace_by_mean(&mut v, v_dim, traced);
    let mut k = vec![0f32; group * k_dim];
    for (t, key) in keys.chunks_exact(k_dim).enumerate() {
        for (c, x) in key.iter().enumerate() {
            k[c * group + t] = *x;
        }
    }
    (k, v)
}

/// Replace the rows `traced` of `x (G, dim)` by the mean of the other rows, so that they stretch no
/// range. Rows are summed in their order; the mean is kept within the rows' min and max, which
/// rounding could leave.
fn replace_by_mean(x: &mut [f32], dim: usize, traced: &[u8]) {
    if traced.is_empty() {
        return;
    }
    let (mut sum, mut low, mut high) = (
        vec![0f32; dim],
        vec![f32::INFINITY; dim],
        vec![f32::NEG_INFINITY; dim],
    );
    let others = || {
        (0u8..)
            .zip(x.chunks_exact(dim))
            .filter(|(t, _)| !traced.contains(t))
    };
    for (_, row) in others() {
        for (c, x) in row.iter().enumerate() {
            sum[c] += x;
            low[c] = low[c].min(*x);
            high[c] = high[c].max(*x);
        }
    }
    let count = others().count() as f32;
    for c in 0..dim {
        let mean = (sum[c] / count).max(low[c]).min(high[c]);
        for t in traced {
            x[usize::from(*t) * dim + c] = mean;
        }
    }
}

/// A channel's codes and what reads them back.
struct Channel {
    bits: u8,
    affine: Affine,
    codes: Vec<u8>,
}

fn quantize_keys(
    spec: &LayerSpec,
    traced: &[u8],
    weights: Option<&Weights>,
    k: &[f32],
    bytes: &mut [u8],
) -> Option<()> {
    let (layout, group) = (&spec.layout, spec.layout.group_size);
    let mut weight = vec![1f32; group];
    for t in traced {
        weight[usize::from(*t)] = 0.0;
    }
    let channel = |x: &[f32], bits: u8| -> Option<Channel> {
        let mut codes = vec![0u8; group];
        let how = (spec.config.clip, Spread::Variance);
        let affine = quantize_group(spec, (x, &weight), bits, how, &mut codes)?;
        Some(Channel {
            bits,
            affine,
            codes,
        })
    };
    let rows: Vec<&[f32]> = k.chunks_exact(group).collect();
    let channels = rows.iter().map(|x| channel(x, layout.k_bits));
    let mut channels: Vec<Channel> = channels.collect::<Option<_>>()?;
    let mut boosted = Vec::new();
    if layout.boosted > 0 {
        let errors = channels
            .iter()
            .zip(&rows)
            .enumerate()
            .map(|(c, (channel, x))| {
                let error = squared_error(x, &weight, channel.affine, channel.bits);
                weights.map_or(error, |weights| weights.error(c, error))
            });
        boosted = worst(&errors.collect::<Vec<f32>>(), layout.boosted);
    }
    for &c in &boosted {
        channels[c] = channel(rows[c], layout.k_bits + 1)?;
    }
    if let Some(weights) = weights {
        make_up(spec, traced, weights, &boosted, &rows, &mut channels);
    }
    write_keys(layout, &boosted, &mut channels, bytes);
    Some(())
}

/// Choose codes anew, so that channels make up for each other's errors: boosted ones first, then the others, each in
/// ascending order. Codes of traced tokens, which nobody reads, stay.
fn make_up(
    spec: &LayerSpec,
    traced: &[u8],
    weights: &Weights,
    boosted: &[usize],
    rows: &[&[f32]],
    channels: &mut [Channel],
) {
    let others = (0..channels.len()).filter(|c| boosted.binary_search(c).is_err());
    let order: Vec<usize> = boosted.iter().copied().chain(others).collect();
    let mut sums = vec![0f32; spec.layout.group_size];
    for (&c, part) in order.iter().zip(weights.feedback(&order)) {
        let channel = &mut channels[c];
        let stay: Vec<u8> = traced
            .iter()
            .map(|t| channel.codes[usize::from(*t)])
            .collect();
        let (affine, bits) = (channel.affine, channel.bits);
        (spec.ops.encode_fed_back)(rows[c], affine, bits, part, &mut sums, &mut channel.codes);
        for (t, code) in traced.iter().zip(stay) {
            channel.codes[usize::from(*t)] = code;
        }
    }
}

fn write_keys(layout: &PageLayout, boosted: &[usize], channels: &mut [Channel], bytes: &mut [u8]) {
    let (bits, size) = (layout.k_bits, layout.k_channel_bytes());
    let high = packed_len(layout.group_size, 1);
    for (i, &c) in boosted.iter().enumerate() {
        let codes = &mut channels[c].codes;
        let plane = &mut bytes[layout.k_high.clone()][i * high..][..high];
        pack_bits(codes, bits, plane);
        codes.iter_mut().for_each(|code| *code &= (1u8 << bits) - 1);
        let place = &mut bytes[layout.k_boosted.clone()][2 * i..][..2];
        place.copy_from_slice(&(c as u16).to_le_bytes());
    }
    for (c, channel) in channels.iter().enumerate() {
        let packed = &mut bytes[layout.k_codes.clone()][c * size..][..size];
        pack(&channel.codes, bits, packed);
        put_f16(&mut bytes[layout.k_scale.clone()], c, channel.affine.scale);
        put_f16(&mut bytes[layout.k_min.clone()], c, channel.affine.min);
    }
}

/// One group of keys or values: codes from ranges searched as `clip` says, and, if values' ranges are
/// searched too, read back with this spread.
fn quantize_group(
    spec: &LayerSpec,
    (x, weight): (&[f32], &[f32]),
    bits: u8,
    (clip, spread): (Clip, Spread),
    codes: &mut [u8],
) -> Option<Affine> {
    let affine = (spec.ops.quantize_group)(x, weight, bits, clip, codes)?;
    Some(match clip {
        Clip::Both => stretched(x, weight, codes, affine, spread),
        Clip::None | Clip::Keys => affine,
    })
}

/// The `count` channels of largest error, ascending; of equals the lower.
fn worst(errors: &[f32], count: usize) -> Vec<usize> {
    let mut channels: Vec<usize> = (0..errors.len()).collect();
    channels.sort_by(|a, b| errors[*b].total_cmp(&errors[*a]));
    channels.truncate(count);
    channels.sort_unstable();
    channels
}

fn quantize_values(spec: &LayerSpec, v: &[f32], bytes: &mut [u8]) -> Option<()> {
    let layout = &spec.layout;
    let bits = layout.v_bits;
    let weight = vec![1f32; layout.v_dim];
    let clip = match spec.config.clip {
        Clip::Keys => Clip::None,
        clip => clip,
    };
    let mut codes = vec![0u8; layout.v_dim];
    for (t, x) in v.chunks_exact(layout.v_dim).enumerate() {
        for group in 0..layout.v_groups() {
            let channels = layout.v_group(group);
            let (x, codes) = (&x[channels.clone()], &mut codes[channels.clone()]);
            let weight = &weight[channels.clone()];
            let affine = quantize_group(spec, (x, weight), bits, (clip, Spread::Gain), codes)?;
            let at = t * layout.v_token_bytes() + packed_len(channels.start, bits);
            let packed = &mut bytes[layout.v_codes.clone()][at..];
            pack(codes, bits, &mut packed[..packed_len(channels.len(), bits)]);
            let at = group * layout.group_size + t;
            put_f16(&mut bytes[layout.v_scale.clone()], at, affine.scale);
            put_f16(&mut bytes[layout.v_min.clone()], at, affine.min);
        }
    }
    Some(())
}

fn not_representable(spec: &LayerSpec, what: &'static str, head: usize) -> Error {
    Error::NotRepresentable {
        layer: spec.layer,
        what,
        head,
    }
}
