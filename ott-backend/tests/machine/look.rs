//! What can be seen of the cache, against the model and the paper's rules.

use candle_core::{DType, Tensor};
use ott_backend::cache::CHUNK;

use super::{Machine, Page, Pages, LAYERS};
use crate::harness::{numbers, rows, Sequence, Text};
use crate::pool::Prefix;
use crate::reference::{attend, Head, Token};

/// Numbers made of codes: as in `cache`.
const STORED: f32 = 1e-6;

impl Machine {
    /// What a sequence reads in one layer: pages as the paper's rules make them, the rest exactly.
    fn expected(&mut self, s: &Sequence, layer: usize, pages: usize) -> Vec<Token> {
        let group = self.rules.group;
        let mut tokens = self.host.model.tokens(&s.text, layer, 0, s.past);
        for (i, part) in tokens.chunks_mut(group).enumerate().take(pages) {
            let prefix = Prefix::new(&s.text, (i + 1) * group);
            part.clone_from_slice(&self.page(prefix, layer).tokens);
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

    /// Answers of all rows but `bad`: of a prompt over the stored tokens as they were before the new ones, of other steps
    /// as they are after them.
    pub(super) fn check_attention(
        &mut self,
        rows_before: &[(usize, Sequence, usize)],
        pages: &[Pages],
        prompt: bool,
        out: &[Option<Tensor>],
        bad: Option<usize>,
    ) {
        let attn = self.host.model.attn;
        for (r, ((_, s, new), pages)) in rows_before.iter().zip(pages).enumerate() {
            for layer in (0..LAYERS).filter(|_| Some(r) != bad) {
                let Some(out) = &out[layer] else { continue };
                let out = rows(&out.narrow(0, r, 1).unwrap()).unwrap();
                let [q, _, _] = self.host.model.qkv(&s.text, layer, s.past, s.past + new);
                let all = Sequence {
                    past: s.past + new,
                    ..s.clone()
                };
                let read = if prompt { pages.before } else { pages.after };
                let all = self.expected(&all, layer, read);
                for (h, q) in rows(&q).unwrap().iter().enumerate() {
                    for (t, q) in q.iter().enumerate() {
                        let want = attend(&all[..=s.past + t], q, attn.scale, attn.softcap);
                        for (got, want) in out[h][t].iter().zip(want) {
                            let error = (f64::from(*got) - want).abs();
                            assert!(
                                error <= self.budget,
                                "sequence {}, layer {layer}: {error}",
                                s.id
                            );
                        }
                    }
                }
            }
        }
    }

    /// Everything that can be seen of the cache is what the model says.
    pub(super) fn check(&mut self) {
        for i in 0..self.live.len() {
            if self.live[i].window.is_none() {
                continue; // A look would be its first step.
            }
            let s = self.live[i].stored.clone();
            let step = self.host.begin(true, &[(&s, 0)]).unwrap();
            let pages = self.begun(&[(i, s.clone(), 0)])[0].before;
            for layer in 0..LAYERS {
                let (k, v) = step.past(layer, 0, DType::F32).unwrap();
                let (k, v) = (numbers(&k), numbers(&v));
                let want = self.expected(&s, layer, pages);
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
        // The last look was a step of no tokens.
        if self.live.iter().any(|live| live.window.is_some()) {
            assert!(self.host.cache.end_step().unwrap().is_empty());
        }
        for layer in 0..LAYERS {
            let (mut sealed, mut traced, mut chunks) = (0, 0, 0);
            for (block, held) in self.blocks.clone() {
                if held.open {
                    let len = (held.prefix.end - 1) % self.rules.group + 1;
                    chunks += len.div_ceil(CHUNK);
                }
                if held.page {
                    sealed += 1;
                    traced += self.page(held.prefix, layer).traced;
                    let bytes = self.inspect.page(layer, block).unwrap();
                    let first = self.bytes.entry((held.prefix, layer));
                    assert_eq!(*first.or_insert(bytes.clone()), bytes, "{held:?}");
                }
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
