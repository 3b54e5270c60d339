//! A whole backend, as small as it gets: the example of docs/seam.md.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{bail, DType, Error, Result, Tensor};
use mistralrs_kv_backend::{
    toy, KvAttn, KvBackendProvider, KvCacheBackend, KvMemory, KvModelSource, KvPlan, KvRow,
    KvShape, KvStep,
};

// [example]
/// Keys and values of one block in one layer, `(num_kv_heads, tokens, channels)` each.
type Page = (Tensor, Tensor);

#[derive(Debug)]
struct Cache {
    shape: KvShape,
    /// By layer and block.
    pages: Mutex<HashMap<(usize, usize), Page>>,
}

#[derive(Debug)]
struct Step(Arc<Cache>, KvPlan);

impl KvStep for Step {
    fn plan(&self) -> &KvPlan {
        &self.1
    }

    fn past(&self, layer: usize, row: usize, dtype: DType) -> Result<(Tensor, Tensor)> {
        let row = &self.1.rows[row];
        let (k, v) = self.0.gather(layer, row, row.past)?;
        Ok((k.to_dtype(dtype)?, v.to_dtype(dtype)?))
    }

    fn append(&self, layer: usize, _q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        let size = self.0.shape.block_size;
        let mut pages = self.0.pages.lock().unwrap_or_else(PoisonError::into_inner);
        for (i, row) in self.1.rows.iter().enumerate() {
            let mut done = 0;
            while done < row.new {
                let (block, offset) = ((row.past + done) / size, (row.past + done) % size);
                let now = (size - offset).min(row.new - done);
                let place = (layer, row.blocks[block]);
                let extend = |old: Option<&Tensor>, new: &Tensor| {
                    let new = new.get(i)?.narrow(1, done, now)?.contiguous()?;
                    match old {
                        Some(old) if offset > 0 => {
                            Tensor::cat(&[&old.narrow(1, 0, offset)?, &new], 1)
                        }
                        _ => Ok(new),
                    }
                };
                let old = pages.get(&place);
                let page = (
                    extend(old.map(|page| &page.0), k)?,
                    extend(old.map(|page| &page.1), v)?,
                );
                pages.insert(place, page);
                done += now;
            }
        }
        Ok(())
    }

    fn decode(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
    ) -> Result<Tensor> {
        self.append(layer, q, k, v)?;
        let attend = |(i, row): (usize, &KvRow)| {
            if row.new != 1 {
                bail!(
                    "sequence {} decodes {} tokens; one at a time is served",
                    row.seq,
                    row.new
                );
            }
            let (k, v) = self.0.gather(layer, row, row.past + 1)?;
            let (heads, kv_heads) = (q.dim(1)?, k.dim(1)?);
            let q = q.get(i)?.reshape((1, kv_heads, heads / kv_heads, ()))?;
            let mut scores = (q.matmul(&k.t()?)? * f64::from(attn.scale))?;
            if let Some(cap) = attn.softcap.map(f64::from) {
                scores = ((scores / cap)?.tanh()? * cap)?;
            }
            let weights = scores.broadcast_sub(&scores.max_keepdim(3)?)?.exp()?;
            let weights = weights.broadcast_div(&weights.sum_keepdim(3)?)?;
            weights.matmul(&v)?.reshape((1, heads, 1, ()))
        };
        let rows = self.1.rows.iter().enumerate().map(attend);
        Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)
    }
}

impl Cache {
    /// The first `tokens` tokens of a row, `(1, num_kv_heads, tokens, channels)` each.
    fn gather(&self, layer: usize, row: &KvRow, tokens: usize) -> Result<Page> {
        let pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let l = &self.shape.layers[layer];
        let empty = |dim| Tensor::zeros((l.num_kv_heads, 0, dim), self.shape.dtype, &l.device);
        let (mut k, mut v) = (vec![empty(l.k_dim)?], vec![empty(l.v_dim)?]);
        for &block in &row.blocks[..tokens.div_ceil(self.shape.block_size)] {
            let page = pages.get(&(layer, block));
            let page = page.ok_or_else(|| Error::Msg(format!("block {block} holds nothing")))?;
            k.push(page.0.clone());
            v.push(page.1.clone());
        }
        let join = |xs: &[Tensor]| Tensor::cat(xs, 1)?.narrow(1, 0, tokens)?.unsqueeze(0);
        Ok((join(&k)?.contiguous()?, join(&v)?.contiguous()?))
    }
}

/// What the host holds: a handle on the cache that its steps share.
struct Minimal(Arc<Cache>);

impl Minimal {
    fn forget(&self, dead: impl Fn(usize) -> bool) {
        let mut pages = self.0.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.retain(|(_, block), _| !dead(*block));
    }
}

impl KvCacheBackend for Minimal {
    fn begin_step(&self, plan: KvPlan) -> Result<Arc<dyn KvStep>> {
        let size = self.0.shape.block_size;
        if let Some(row) = plan
            .rows
            .iter()
            .find(|r| (r.past + r.new).div_ceil(size) > r.blocks.len())
        {
            bail!(
                "sequence {}: {} + {} tokens in {} blocks",
                row.seq,
                row.past,
                row.new,
                row.blocks.len()
            );
        }
        Ok(Arc::new(Step(Arc::clone(&self.0), plan)))
    }

    fn allocated(&self, _seq: usize, blocks: &[usize]) {
        self.forget(|block| blocks.contains(&block));
    }

    fn released(&self, _seq: usize, _blocks: &[usize]) -> Vec<usize> {
        Vec::new() // They may be hit again.
    }

    fn reset(&self) {
        self.forget(|_| true);
    }

    fn describe(&self) -> String {
        format!(
            "minimal: keys and values as {:?} tensors",
            self.0.shape.dtype
        )
    }

    fn allocated_bytes(&self) -> usize {
        let pages = self.0.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
        pages.values().map(|(k, v)| bytes(k) + bytes(v)).sum()
    }
}

struct Provider;

impl KvBackendProvider for Provider {
    fn name(&self) -> &'static str {
        "minimal"
    }

    fn check_options(&self, options: &str) -> anyhow::Result<()> {
        anyhow::ensure!(
            options.is_empty(),
            "`minimal` has no options, not even `{options}`"
        );
        Ok(())
    }

    fn check_model(&self, _source: &KvModelSource<'_>, _options: &str) -> anyhow::Result<()> {
        Ok(()) // Whatever the seam can carry.
    }

    fn block_size(&self, user: Option<usize>, _options: &str) -> anyhow::Result<usize> {
        Ok(user.unwrap_or(32))
    }

    fn memory(&self, shape: &KvShape) -> anyhow::Result<KvMemory> {
        let channels = shape
            .layers
            .iter()
            .map(|l| l.num_kv_heads * (l.k_dim + l.v_dim));
        let bytes = channels.sum::<usize>() * shape.dtype.size_in_bytes();
        Ok(KvMemory {
            per_block: shape.block_size * bytes,
            fixed: 0,
        })
    }

    fn create(
        &self,
        shape: KvShape,
        _num_blocks: usize,
    ) -> anyhow::Result<Arc<dyn KvCacheBackend>> {
        let pages = Mutex::default();
        Ok(Arc::new(Minimal(Arc::new(Cache { shape, pages }))))
    }
}
// [/example]

/// Both are full precision, so they must agree, with a wrapped block table and a row that starts.
#[test]
fn it_agrees_with_the_toy() -> anyhow::Result<()> {
    let layer = mistralrs_kv_backend::KvLayer {
        num_heads: 4,
        num_kv_heads: 2,
        k_dim: 8,
        v_dim: 6,
        device: candle_core::Device::Cpu,
    };
    let shape = KvShape {
        layers: vec![layer],
        dtype: DType::F32,
        block_size: 4,
        max_seq_len: 64,
        max_seqs: 2,
        options: String::new(),
    };
    let random = |h: usize, tokens: usize, dim: usize| {
        Tensor::rand(-1f32, 1f32, (2, h, tokens, dim), &candle_core::Device::Cpu)
    };
    let (k, v) = (random(2, 6, 8)?, random(2, 6, 6)?);
    let (q, k1, v1) = (random(4, 1, 8)?, random(2, 1, 8)?, random(2, 1, 6)?);
    let attn = KvAttn {
        scale: 0.4,
        softcap: Some(2.0),
    };
    let run = |provider: &dyn KvBackendProvider| -> anyhow::Result<Vec<f32>> {
        let cache = provider.create(shape.clone(), 8)?;
        let plan = |prompt, past: [usize; 2], new| KvPlan {
            prompt,
            block_size: 4,
            rows: vec![
                KvRow {
                    seq: 1,
                    past: past[0],
                    new,
                    blocks: vec![5, 2],
                },
                KvRow {
                    seq: 2,
                    past: past[1],
                    new,
                    blocks: vec![1, 4],
                },
            ],
        };
        cache.allocated(1, &[5, 2]);
        cache.allocated(2, &[1, 4]);
        let step = cache.begin_step(plan(true, [0, 0], 6))?;
        assert_eq!(step.past(0, 1, DType::F16)?.0.dims(), [1, 2, 0, 8]);
        step.append(0, &k, &k, &v)?;
        let out = cache
            .begin_step(plan(false, [6, 6], 1))?
            .decode(0, &q, &k1, &v1, attn)?;
        let (pk, pv) = cache
            .begin_step(plan(false, [7, 7], 1))?
            .past(0, 0, DType::F32)?;
        let all = [out.flatten_all()?, pk.flatten_all()?, pv.flatten_all()?];
        Ok(Tensor::cat(&all, 0)?.to_vec1()?)
    };
    let (ours, toys) = (run(&Provider)?, run(&*toy::provider())?);
    assert_eq!(ours.len(), toys.len());
    assert!(ours.iter().zip(&toys).all(|(a, b)| (a - b).abs() < 1e-5));
    Ok(())
}

/// docs/seam.md shows this very code. (It is not there if the crate lives elsewhere.)
#[test]
fn the_documentation_shows_it() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/seam.md");
    let Ok(page) = std::fs::read_to_string(page) else {
        return;
    };
    let code = include_str!("minimal.rs")
        .split("// [example]\n")
        .nth(1)
        .unwrap();
    let code = code.split("// [/example]\n").next().unwrap();
    assert!(
        page.contains(code),
        "copy the example of tests/minimal.rs into docs/seam.md"
    );
}
