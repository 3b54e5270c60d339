//! What can be seen of the cache, against the model and the paper's rules.

use candle_core::{DType, Tensor};
use ott_backend::cache::CHUNK;

use super::{Machine, Page, LAYERS};
use crate::harness::{numbers, rows, Sequence, Text};
use crate::pool::Prefix;
use crate::reference::{attend, Head, Token};

/// Attention in f32 against f64, and numbers made of codes: as in `cache`.
const F32: f64 = 2e-4;
const STORED: f32 = 1e-6;

impl Machine {
    /// What a sequence reads in one layer: pages as the paper's rules make them, the rest exactly.
    pub(super) fn expected(&mut self, s: &Sequence, layer: usize) -> Vec<Token> {
        let group = self.rules.group;
        let mut tokens = self.host.model.tokens(&s.text, layer, 0, s.past);
        for (i, part) in tokens.chunks_mut(group).enumerate() {
            let prefix = Prefix::new(&s.text, (i + 1) * group);
            if self.blocks[&s.blocks[i]].sealed {
                part.clone_from_slice(&self.page(prefix, layer).tokens);
            }
        }
        tokens
    }

    pub(super) fn page(&mut self, prefix: Prefix, layer: usize) -> &Page {
        let (rules, model) = (self.rules.in_layer(layer), &self.host.model);
        let text = Text {
            seed: prefix.seed,
            fork: prefix.fork,
            ..self.texts[0].clone()
        };
        self.reference.entry((prefix, layer)).or_insert_with(|| {
            let mut head = Head::new(rules);
            let tokens = model.tokens(&text, layer, 0, prefix.end);
            tokens.into_iter().for_each(|token| head.push(token));
            head.flush();
            let start = prefix.end - rules.group;
            Page {
                tokens: head.past().split_off(start),
                traced: head.traced.range(start..).count(),
            }
        })
    }

    pub(super) fn check_attention(
        &self,
        rows_before: &[(usize, Sequence, usize)],
        past: &[Vec<Vec<Token>>],
        out: &[Option<Tensor>],
    ) {
        let attn = self.host.model.attn;
        for (r, (_, s, new)) in rows_before.iter().enumerate() {
            for (layer, past) in past[r].iter().enumerate() {
                let out = out[layer].as_ref().unwrap().narrow(0, r, 1).unwrap();
                let out = rows(&out).unwrap();
                let [q, _, _] = self.host.model.qkv(&s.text, layer, s.past, s.past + new);
                let own = self.host.model.tokens(&s.text, layer, 0, s.past + new);
                let all: Vec<Token> = past.iter().chain(&own[past.len()..]).cloned().collect();
                for (h, q) in rows(&q).unwrap().iter().enumerate() {
                    for (t, q) in q.iter().enumerate() {
                        let want = attend(&all[..=s.past + t], q, attn.scale, attn.softcap);
                        for (got, want) in out[h][t].iter().zip(want) {
                            let error = (f64::from(*got) - want).abs();
                            assert!(error <= F32, "sequence {}, layer {layer}: {error}", s.id);
                        }
                    }
                }
            }
        }
    }

    /// Everything that can be seen of the cache is what the model says.
    pub(super) fn check(&mut self) {
        for i in 0..self.live.len() {
            let s = self.live[i].stored.clone();
            let step = self.host.begin(true, &[(&s, 0)]).unwrap();
            for layer in 0..LAYERS {
                let (k, v) = step.past(layer, 0, DType::F32).unwrap();
                let (k, v) = (numbers(&k), numbers(&v));
                let want = self.expected(&s, layer);
                let part = |part: fn(&Token) -> &Vec<f32>| want.iter().flat_map(part).collect();
                let want: [Vec<&f32>; 2] = [part(|t| &t.k), part(|t| &t.v)];
                for (got, want) in [k, v].iter().zip(want) {
                    assert_eq!(got.len(), want.len());
                    for (j, (got, want)) in got.iter().zip(want).enumerate() {
                        let near = (got - want).abs() <= STORED * (1.0 + want.abs());
                        assert!(near, "{s:?}, layer {layer}, token {}", j / 32);
                    }
                }
            }
        }
        for layer in 0..LAYERS {
            let (mut sealed, mut traced, mut chunks) = (0, 0, 0);
            for (block, held) in self.blocks.clone() {
                if !held.sealed {
                    let len = (held.prefix.end - 1) % self.rules.group + 1;
                    chunks += len.div_ceil(CHUNK);
                    continue;
                }
                sealed += 1;
                traced += self.page(held.prefix, layer).traced;
                let bytes = self.inspect.page(layer, block).unwrap();
                let first = self.bytes.entry((held.prefix, layer));
                assert_eq!(*first.or_insert(bytes.clone()), bytes, "{held:?}");
            }
            let stats = self.inspect.stats(layer).unwrap();
            let found = (
                stats.sealed_blocks,
                stats.traced_tokens,
                stats.staging_chunks,
            );
            assert_eq!(found, (sealed, traced, chunks), "layer {layer}");
        }
        assert!(self.host.cache.allocated_bytes() <= self.answered);
    }
}
