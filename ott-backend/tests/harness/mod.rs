//! The host's side of the seam in a page: blocks handed out, steps begun, tensors painted.
#![allow(dead_code)] // Each suite uses a part.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use half::f16;
use mistralrs_kv_backend::{
    KvAttn, KvBackendProvider, KvCacheBackend, KvLayer, KvPlan, KvRow, KvShape, KvStep,
};

use crate::reference::{Head, Rules, Token};

/// A model as the cache sees it; all layers alike.
#[derive(Clone, Debug)]
pub struct Model {
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub k_dim: usize,
    pub v_dim: usize,
    pub dtype: DType,
    pub options: String,
    pub attn: KvAttn,
    pub max_seqs: usize,
    /// Where the cache and its tensors lie.
    pub device: Device,
}

impl Model {
    /// Small and awkward: GQA 3, unequal head sizes are the caller's wish.
    pub fn new(options: &str) -> Self {
        Self {
            layers: 3,
            heads: 6,
            kv_heads: 2,
            k_dim: 64,
            v_dim: 64,
            dtype: DType::F32,
            options: options.to_owned(),
            attn: KvAttn {
                scale: 0.125,
                softcap: None,
            },
            max_seqs: 8,
            device: Device::Cpu,
        }
    }

    pub fn heads(mut self, heads: usize, kv_heads: usize) -> Self {
        (self.heads, self.kv_heads) = (heads, kv_heads);
        self
    }

    pub fn dims(mut self, k_dim: usize, v_dim: usize) -> Self {
        (self.k_dim, self.v_dim) = (k_dim, v_dim);
        self.attn.scale = 1.0 / (k_dim as f32).sqrt();
        self
    }

    pub fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = dtype;
        self
    }

    pub fn block_size(&self) -> usize {
        let provider = ott_backend::provider();
        provider.block_size(None, &self.options).unwrap()
    }

    pub fn shape(&self) -> KvShape {
        let layer = KvLayer {
            num_heads: self.heads,
            num_kv_heads: self.kv_heads,
            k_dim: self.k_dim,
            v_dim: self.v_dim,
            device: self.device.clone(),
        };
        KvShape {
            layers: vec![layer; self.layers],
            dtype: self.dtype,
            block_size: self.block_size(),
            max_seq_len: 8192,
            max_seqs: self.max_seqs,
            options: self.options.clone(),
        }
    }

    pub fn host(&self, num_blocks: usize) -> Host {
        let cache = ott_backend::provider().create(self.shape(), num_blocks);
        Host {
            model: self.clone(),
            block_size: self.block_size(),
            cache: cache.unwrap(),
        }
    }

    /// Keys, values and queries of tokens `from..to`, as the model would compute them.
    pub fn qkv(&self, text: &Text, layer: usize, from: usize, to: usize) -> [Tensor; 3] {
        let paint = |role: Role, heads: usize, dim: usize| {
            let places = (0..heads).flat_map(|h| (from..to).map(move |t| (h, t)));
            let numbers: Vec<f32> = places
                .flat_map(|(h, t)| (0..dim).map(move |c| text.number(role, layer, h, t, c)))
                .collect();
            let x = Tensor::from_vec(numbers, (1, heads, to - from, dim), &self.device);
            x.unwrap().to_dtype(self.dtype).unwrap()
        };
        [
            paint(Role::Query, self.heads, self.k_dim),
            paint(Role::Key, self.kv_heads, self.k_dim),
            paint(Role::Value, self.kv_heads, self.v_dim),
        ]
    }

    /// Tokens `from..to` of one key/value head, rounded to the activation dtype.
    pub fn tokens(&self, text: &Text, layer: usize, head: usize, to: usize) -> Vec<Token> {
        let [_, k, v] = self.qkv(text, layer, 0, to);
        let rows = |x: &Tensor| -> Vec<Vec<f32>> {
            let x = x.to_dtype(DType::F32).unwrap();
            let head = x.get(0).and_then(|x| x.get(head)).unwrap();
            head.to_vec2().unwrap()
        };
        let pairs = rows(&k).into_iter().zip(rows(&v));
        pairs.map(|(k, v)| Token { k, v }).collect()
    }

    /// The paper's view of the same head after `to` tokens.
    pub fn reference(
        &self,
        rules: Rules,
        text: &Text,
        (layer, head): (usize, usize),
        to: usize,
    ) -> Head {
        let mut reference = Head::new(rules.in_layer(layer));
        let tokens = self.tokens(text, layer, head, to);
        tokens.into_iter().for_each(|token| reference.push(token));
        reference
    }
}

#[derive(Clone, Copy)]
pub enum Role {
    Query,
    Key,
    Value,
}

/// What a sequence says: numbers that depend on every coordinate and never repeat, so that no swap
/// of blocks, heads, tokens, channels or layers can cancel. All are numbers of f16, the precision
/// of the window and of traced tokens.
#[derive(Clone, Debug, Default)]
pub struct Text {
    pub seed: u64,
    /// The paper's outlier tokens: position, and the factor that makes its key small.
    pub outliers: Vec<(usize, f32)>,
    /// From this token on, another seed: a text with the same beginning.
    pub fork: Option<(usize, u64)>,
}

impl Text {
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            ..Self::default()
        }
    }

    pub fn with_outliers(seed: u64, outliers: &[(usize, f32)]) -> Self {
        Self {
            seed,
            outliers: outliers.to_vec(),
            fork: None,
        }
    }

    /// The same up to token `at`, another text from there.
    pub fn forked(&self, at: usize, seed: u64) -> Self {
        Self {
            fork: Some((at, seed)),
            ..self.clone()
        }
    }

    pub fn number(&self, role: Role, layer: usize, head: usize, token: usize, c: usize) -> f32 {
        let place = [role as usize, layer, head, token, c];
        let fork = self.fork.filter(|(at, _)| token >= *at);
        let seed = fork.map_or(self.seed, |(_, seed)| seed);
        let noise = place.iter().fold(seed, |hash, x| mix(hash ^ (*x as u64)));
        let noise = (noise >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        let number = match role {
            Role::Key => {
                // Channels of a key have a level of their own, as in real models: that is what makes
                // a small key an outlier.
                let level =
                    [4.0, -2.0, 3.0, -2.5, 1.5, 3.5, -2.2][c % 7] * (1.0 + head as f32 / 8.0);
                let outlier = self.outliers.iter().find(|o| o.0 == token);
                (level + noise * [0.6, 0.9, 0.3, 0.8, 0.5][c % 5]) * outlier.map_or(1.0, |o| o.1)
            }
            _ => noise,
        };
        f16::from_f32(number).to_f32()
    }
}

/// The finaliser of splitmix64.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A running cache.
pub struct Host {
    pub model: Model,
    pub block_size: usize,
    pub cache: Arc<dyn KvCacheBackend>,
}

/// One sequence of it.
#[derive(Clone, Debug)]
pub struct Sequence {
    pub id: usize,
    pub text: Text,
    /// In order; all of them allocated.
    pub blocks: Vec<usize>,
    /// Tokens stored.
    pub past: usize,
}

impl Host {
    /// A sequence that gets its blocks now.
    pub fn sequence(&self, id: usize, text: &Text, blocks: &[usize]) -> Sequence {
        self.cache.allocated(id, blocks);
        Sequence {
            id,
            text: text.clone(),
            blocks: blocks.to_vec(),
            past: 0,
        }
    }

    pub fn begin(&self, prompt: bool, rows: &[(&Sequence, usize)]) -> Result<Arc<dyn KvStep>> {
        let row = |(sequence, new): &(&Sequence, usize)| KvRow {
            seq: sequence.id,
            past: sequence.past,
            new: *new,
            blocks: sequence.blocks.clone(),
        };
        self.cache.begin_step(KvPlan {
            prompt,
            block_size: self.block_size,
            rows: rows.iter().map(row).collect(),
        })
    }

    /// The next `new` tokens of one sequence through every layer; what each layer answered.
    pub fn step(&self, s: &mut Sequence, new: usize, prompt: bool) -> Result<Vec<Option<Tensor>>> {
        self.step_all(&mut [(s, new)], prompt)
    }

    /// The same for several sequences at once; shorter rows are padded with noise.
    pub fn step_all(
        &self,
        rows: &mut [(&mut Sequence, usize)],
        prompt: bool,
    ) -> Result<Vec<Option<Tensor>>> {
        let view: Vec<(&Sequence, usize)> = rows.iter().map(|(s, new)| (&**s, *new)).collect();
        let step = self.begin(prompt, &view)?;
        let longest = view.iter().map(|row| row.1).max().unwrap_or(0);
        let mut out = vec![];
        for layer in 0..self.model.layers {
            let all: Vec<[Tensor; 3]> = view
                .iter()
                .map(|(s, _)| self.model.qkv(&s.text, layer, s.past, s.past + longest))
                .collect();
            let stack = |i: usize| Tensor::cat(&all.iter().map(|x| &x[i]).collect::<Vec<_>>(), 0);
            let (q, k, v) = (stack(0)?, stack(1)?, stack(2)?);
            out.push(if prompt {
                let attended = step.prefill(layer, &q, &k, &v, self.model.attn)?;
                step.append(layer, &q, &k, &v)?;
                attended
            } else {
                Some(step.decode(layer, &q, &k, &v, self.model.attn)?)
            });
        }
        let faults = self.cache.end_step()?;
        assert!(faults.is_empty(), "{faults:?}");
        rows.iter_mut().for_each(|(s, new)| s.past += *new);
        Ok(out)
    }

    /// Stored keys and values of a sequence in one layer, `[head][token]`.
    pub fn past(&self, s: &Sequence, layer: usize) -> Result<Vec<Vec<Token>>> {
        let step = self.begin(true, &[(s, 0)])?;
        let (k, v) = step.past(layer, 0, DType::F32)?;
        let (k, v) = (rows(&k)?, rows(&v)?);
        let head = |(k, v): (Vec<Vec<f32>>, Vec<Vec<f32>>)| {
            k.into_iter().zip(v).map(|(k, v)| Token { k, v }).collect()
        };
        Ok(k.into_iter().zip(v).map(head).collect())
    }
}

/// What no scale can hold is told at the end of its own step, for its own sequence: of eight, seven go on, and what was
/// stored before can be hit.
pub fn a_bad_row_of_eight_ends_alone(model: Model) {
    let host = model.host(40);
    let mut all: Vec<Sequence> = (0..8)
        .map(|i| {
            host.sequence(
                i,
                &Text::new(7 + i as u64),
                &[1 + 3 * i, 2 + 3 * i, 3 + 3 * i],
            )
        })
        .collect();
    for s in &mut all {
        host.step(s, 200, true).expect("served");
    }
    let rows: Vec<(&Sequence, usize)> = all.iter().map(|s| (s, 1)).collect();
    let step = host.begin(false, &rows).expect("it fits");
    for layer in 0..model.layers {
        let of = |s: &Sequence| model.qkv(&s.text, layer, s.past, s.past + 1);
        let parts: Vec<[Tensor; 3]> = all.iter().map(of).collect();
        let stack = |i: usize| Tensor::cat(&parts.iter().map(|x| &x[i]).collect::<Vec<_>>(), 0);
        let [q, k, v] = [0, 1, 2].map(|i| stack(i).expect("numbers"));
        let bad = (k.narrow(0, 3, 1).expect("a row") * f64::NAN).expect("numbers");
        let k = match layer {
            1 => {
                let (low, high) = (k.narrow(0, 0, 3), k.narrow(0, 4, 4));
                Tensor::cat(&[low.expect("rows"), bad, high.expect("rows")], 0).expect("rows")
            }
            _ => k,
        };
        let out = step.decode(layer, &q, &k, &v, model.attn).expect("queued");
        let good = [out.narrow(0, 0, 3), out.narrow(0, 4, 4)];
        let good = good.map(|x| numbers(&x.expect("rows").contiguous().expect("rows")));
        assert!(good.iter().flatten().all(|x| x.is_finite()));
    }
    let faults = host.cache.end_step().expect("the device is well");
    assert_eq!((faults.len(), faults[0].seq), (1, 3));
    assert!(faults[0].error.contains("layer 1"), "{faults:?}");
    assert!(
        host.cache.released(3, &all[3].blocks).is_empty(),
        "nothing is lost"
    );
    for s in all.iter_mut().filter(|s| s.id != 3) {
        s.past += 1;
        host.step(s, 1, false).expect("the others go on");
    }
    // The bad sequence's beginning is hit.
    let mut again = all[3].clone();
    (again.id, again.past) = (9, 128);
    again.blocks.truncate(1);
    again.blocks.extend([30, 31]);
    host.cache.allocated(9, &[30, 31]);
    host.step(&mut again, 72, true)
        .expect("its beginning is there");
}

/// `[head][token][channel]` of a tensor with one row.
pub fn rows(x: &Tensor) -> Result<Vec<Vec<Vec<f32>>>> {
    x.to_dtype(DType::F32)?.get(0)?.contiguous()?.to_vec3()
}

/// All numbers of a tensor in order.
pub fn numbers(x: &Tensor) -> Vec<f32> {
    let x = x.to_dtype(DType::F32).unwrap().contiguous().unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Where two stored pasts, `[layer][head][token]`, differ first, if they do: bit for bit.
pub fn difference(a: &[Vec<Vec<Token>>], b: &[Vec<Vec<Token>>]) -> Option<String> {
    let bits = |t: &Token| -> Vec<u32> { t.k.iter().chain(&t.v).map(|x| x.to_bits()).collect() };
    for (layer, (a, b)) in a.iter().zip(b).enumerate() {
        for (head, (a, b)) in a.iter().zip(b).enumerate() {
            if a.len() != b.len() {
                return Some(format!("layer {layer}: {} tokens and {}", a.len(), b.len()));
            }
            for (token, (a, b)) in a.iter().zip(b).enumerate() {
                if bits(a) != bits(b) {
                    return Some(format!("layer {layer}, head {head}, token {token}"));
                }
            }
        }
    }
    (a.len() != b.len()).then(|| format!("{} layers and {}", a.len(), b.len()))
}

/// Few cases, so that the suites take seconds; as many as `PROPTEST_CASES` says, if it is set.
pub fn proptest_config() -> proptest::test_runner::Config {
    let config = proptest::test_runner::Config::default();
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => config,
        None => proptest::test_runner::Config {
            cases: 24,
            ..config
        },
    }
}
