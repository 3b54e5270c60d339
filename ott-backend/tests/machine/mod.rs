//! The model of the cache, and the operations of a host on both.

mod history;
mod look;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::Tensor;
use ott_backend::backend::Inspect;

pub use history::{once_wrong, op, Op, Setting, BOOSTED, LARGER, NO_WINDOW, PLAIN};

use crate::harness::{Host, Model, Sequence, Text};
use crate::pool::{Pool, Prefix};
use crate::reference::{Rules, Token};

const LAYERS: usize = 3;
pub const NUM_BLOCKS: usize = 16;
/// Sequences for which the window was sized; some histories run more, and must get an error.
pub const MAX_SEQS: usize = 3;

/// What a block holds in every layer.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// The tokens up to its last one.
    prefix: Prefix,
    /// Its group is quantised.
    page: bool,
    /// It is in the window of some sequence, in full precision.
    open: bool,
}

/// A running sequence.
struct Live {
    stored: Sequence,
    /// Tokens of its prompt; it is done when so many are stored.
    prompt: usize,
    /// Blocks of its window; `None` before its first step.
    window: Option<Vec<usize>>,
}

impl Live {
    fn is_prompt(&self) -> bool {
        self.stored.past < self.prompt
    }

    fn holds(&self, block: usize) -> bool {
        self.window.iter().flatten().any(|b| *b == block)
    }
}

/// A sealed group of the only key/value head, by the paper's rules.
struct Page {
    tokens: Vec<Token>,
    traced: usize,
}

/// Groups that a row reads as pages before its new tokens are stored, and after.
#[derive(Clone, Copy, Debug)]
struct Pages {
    before: usize,
    after: usize,
}

/// How often what happened.
pub type Seen = BTreeMap<&'static str, usize>;

/// What is judged: a cache behind the seam, a look into it, and the bytes that were answered before it was made.
pub struct Subject {
    pub host: Host,
    pub inspect: Arc<dyn Inspect>,
    pub answered: usize,
}

/// The model that every subject serves.
pub fn model(options: &str) -> Model {
    let mut model = Model::new(options).heads(2, 1).dims(32, 32);
    (model.layers, model.max_seqs) = (LAYERS, MAX_SEQS);
    model
}

pub struct Machine {
    pub seen: Seen,
    rules: Rules,
    host: Host,
    inspect: Arc<dyn Inspect>,
    answered: usize,
    /// Largest error of attention allowed.
    budget: f64,
    pool: Pool,
    blocks: BTreeMap<usize, Block>,
    live: Vec<Live>,
    /// Text and tokens.
    waiting: Vec<(Text, usize)>,
    texts: Vec<Text>,
    sequences: usize,
    /// By prefix and layer: what the reference makes of it, and the bytes that were sealed first.
    reference: HashMap<(Prefix, usize), Page>,
    bytes: HashMap<(Prefix, usize), Vec<u8>>,
}

impl Machine {
    pub fn new(subject: Subject, rules: Rules, seed: u64, budget: f64) -> Self {
        Self {
            seen: Seen::new(),
            rules,
            host: subject.host,
            inspect: subject.inspect,
            answered: subject.answered,
            budget,
            pool: Pool::new(NUM_BLOCKS, rules.group),
            blocks: BTreeMap::new(),
            live: vec![],
            waiting: vec![],
            texts: history::texts(seed),
            sequences: 0,
            reference: HashMap::new(),
            bytes: HashMap::new(),
        }
    }

    pub fn apply(&mut self, op: Op) {
        let who = |who: usize, live: &[Live]| (!live.is_empty()).then(|| who % live.len());
        match op {
            Op::Start { text, tokens, pick } => {
                self.start(self.texts[text].clone(), tokens, pick);
            }
            Op::Prompt { tokens } => self.step(true, tokens, 0),
            Op::Decode { tokens, rejected } => self.step(false, tokens, rejected),
            Op::Fail { layer, prompt } => self.fail(prompt, layer),
            Op::Bad { layer, who, prompt } => self.bad(prompt, who, layer),
            Op::Preempt { who: i } => {
                if let Some(i) = who(i, &self.live) {
                    self.preempt(i);
                }
            }
            Op::Resume { pick } => {
                if let Some((text, tokens)) = self.waiting.pop() {
                    self.start(text, tokens, pick);
                }
            }
            Op::End { who: i } => {
                if let Some(i) = who(i, &self.live) {
                    self.end(i);
                }
            }
            Op::Reset => {
                self.host.cache.reset();
                self.pool = Pool::new(NUM_BLOCKS, self.rules.group);
                self.blocks.clear();
                self.live.clear();
            }
        }
        self.check();
    }

    fn saw(&mut self, what: &'static str, happened: bool) {
        *self.seen.entry(what).or_default() += usize::from(happened);
    }

    fn start(&mut self, text: Text, tokens: usize, pick: usize) {
        let hit = self.pool.hit(&text, tokens, pick);
        let count = tokens.div_ceil(self.rules.group);
        let Some(new) = self.pool.allocate(&hit, count) else {
            self.waiting.push((text, tokens));
            return;
        };
        let open = hit.iter().any(|block| !self.blocks[block].page);
        let left = tokens - hit.len() * self.rules.group;
        self.saw("a hit", !hit.is_empty());
        self.saw("a hit on open blocks", open);
        self.saw("a hit up to the last token", !hit.is_empty() && left == 1);
        self.sequences += 1;
        self.handed_out(self.sequences, &new);
        let stored = Sequence {
            id: self.sequences,
            text,
            past: hit.len() * self.rules.group,
            blocks: [hit, new].concat(),
        };
        self.live.push(Live {
            stored,
            prompt: tokens,
            window: None,
        });
    }

    fn handed_out(&mut self, seq: usize, new: &[usize]) {
        self.host.cache.allocated(seq, new);
        let evicted = new.iter().any(|b| self.blocks.contains_key(b));
        self.saw("pages evicted", evicted);
        self.blocks.retain(|block, _| !new.contains(block));
    }

    /// Who takes part in a step, with how many new tokens.
    fn rows(&self, prompt: bool, tokens: usize) -> Vec<(usize, Sequence, usize)> {
        let live = self.live.iter().enumerate();
        live.filter(|(_, s)| s.is_prompt() == prompt)
            .map(|(i, s)| {
                let left = s.prompt.saturating_sub(s.stored.past);
                let new = if prompt { tokens.min(left) } else { tokens };
                (i, s.stored.clone(), new)
            })
            .collect()
    }

    fn step(&mut self, prompt: bool, tokens: usize, rejected: usize) {
        if !prompt {
            self.grow(tokens);
        }
        let mut after = self.rows(prompt, tokens);
        if after.is_empty() {
            return;
        }
        let before = after.clone();
        let mut rows: Vec<_> = after.iter_mut().map(|(_, s, new)| (s, *new)).collect();
        match self.host.step_all(&mut rows, prompt) {
            Ok(out) => {
                let rejected = rejected.min(tokens - 1).min(self.rules.residual);
                let pages = self.begun(&before);
                after
                    .iter()
                    .zip(&pages)
                    .for_each(|((i, s, new), pages)| self.written(*i, s, s.past - new, *pages));
                self.check_attention(&before, &pages, prompt, &out, None);
                for (i, s, _) in after {
                    self.accepted(i, s, if prompt { 0 } else { rejected });
                }
            }
            Err(error) => {
                let count = self.live.len();
                assert!(count > MAX_SEQS, "{count} sequences: {error}");
                assert!(error.to_string().contains("was sized for"), "{error}");
                self.check(); // Nothing was lost.
                self.saw("no room for the window", true);
                self.end(after[0].0);
            }
        }
    }

    /// Blocks for the next tokens; who gets none is preempted.
    fn grow(&mut self, tokens: usize) {
        for i in (0..self.live.len()).rev() {
            let s = &self.live[i].stored;
            let count = (s.past + tokens).div_ceil(self.rules.group);
            if self.live[i].is_prompt() || count <= s.blocks.len() {
                continue;
            }
            match self.pool.allocate(&[], count - s.blocks.len()) {
                Some(new) => {
                    self.handed_out(s.id, &new);
                    self.live[i].stored.blocks.extend(new);
                }
                None => self.preempt(i),
            }
        }
    }

    /// A step has begun: stored groups that leave a row's window are pages, and so is all that lies before a block that
    /// is only a page, a prefix hit's. Each row holds the blocks of its window after the step; what nobody holds is in full
    /// precision no more.
    fn begun(&mut self, rows: &[(usize, Sequence, usize)]) -> Vec<Pages> {
        let (group, residual) = (self.rules.group, self.rules.residual);
        let plan = |(_, s, new): &(usize, Sequence, usize)| {
            let full = s.past / group;
            let leave = (s.past + new).saturating_sub(residual) / group;
            let hit = (0..full).rev().find(|i| !self.blocks[&s.blocks[*i]].open);
            let before = leave.min(full).max(hit.map_or(0, |i| i + 1));
            let after = before.max(leave);
            Pages { before, after }
        };
        let pages: Vec<Pages> = rows.iter().map(plan).collect();
        let mut old = vec![];
        for ((i, s, new), pages) in rows.iter().zip(&pages) {
            for block in &s.blocks[..pages.before] {
                let held = self.blocks.get_mut(block).unwrap();
                held.page = true;
            }
            let window =
                s.blocks[pages.after..(s.past + new).div_ceil(group).max(pages.after)].to_vec();
            old.extend(self.live[*i].window.replace(window).into_iter().flatten());
            // Tokens that were taken back are gone.
            for (i, block) in s.blocks.iter().enumerate().skip(s.past / group) {
                match s.past.saturating_sub(i * group) {
                    0 => drop(self.blocks.remove(block)),
                    _ => self.blocks.get_mut(block).unwrap().prefix = Prefix::new(&s.text, s.past),
                }
            }
        }
        for block in old {
            self.let_go(block);
        }
        pages
    }

    /// A block that is in nobody's window is a page, or nothing.
    fn let_go(&mut self, block: usize) {
        if self.live.iter().any(|live| live.holds(block)) {
            return;
        }
        if let Some(held) = self.blocks.get_mut(&block) {
            held.open = false;
            if !held.page {
                self.blocks.remove(&block);
            }
        }
    }

    /// New tokens are in the blocks from `past` on.
    fn written(&mut self, i: usize, s: &Sequence, past: usize, pages: Pages) {
        let group = self.rules.group;
        for (place, &block) in s
            .blocks
            .iter()
            .enumerate()
            .take(s.past.div_ceil(group))
            .skip(past / group)
        {
            let now = Block {
                prefix: Prefix::new(&s.text, ((place + 1) * group).min(s.past)),
                page: place < pages.after,
                open: self.live[i].holds(block),
            };
            let old = self.blocks.insert(block, now);
            assert!(old.is_none_or(|old| !old.page), "a page was written again");
        }
    }

    /// The newest tokens but `rejected` ones stay; others will come in the place of these.
    fn accepted(&mut self, i: usize, mut s: Sequence, rejected: usize) {
        s.past -= rejected;
        if rejected > 0 && s.text.fork.is_none_or(|(at, _)| at >= s.past) {
            s.text = s.text.forked(s.past, 1000 + s.id as u64);
        }
        if rejected > 0 {
            let keep = s.past.div_ceil(self.rules.group).max(1);
            let surplus = s.blocks.split_off(keep);
            self.saw("taken back over a block", !surplus.is_empty());
            self.released(s.id, &surplus);
        }
        self.pool.computed(&s.text, &s.blocks, s.past);
        let live = &mut self.live[i];
        if rejected > 0 {
            live.prompt = live.prompt.min(s.past);
        }
        live.stored = s;
    }

    /// A step breaks off after a layer: it never was, the host ends its sequences, and the others go on.
    fn fail(&mut self, prompt: bool, last: usize) {
        // A GPU decodes one token of a sequence in a step.
        let new = if prompt { 3 } else { 1 };
        if !prompt {
            self.grow(new);
        }
        let rows = self.rows(prompt, new);
        if rows.is_empty() {
            return;
        }
        let view: Vec<_> = rows.iter().map(|(_, s, new)| (s, *new)).collect();
        if let Ok(step) = self.host.begin(prompt, &view) {
            for layer in 0..=last {
                let [q, k, v] = self.painted(&view, layer, new);
                match prompt {
                    true => step.append(layer, &q, &k, &v).unwrap(),
                    false => drop(
                        step.decode(layer, &q, &k, &v, self.host.model.attn)
                            .unwrap(),
                    ),
                }
            }
            self.begun(&rows);
        }
        self.saw("a step failed", true);
        rows.iter().rev().for_each(|(i, ..)| self.end(*i));
    }

    /// Queries, keys and values of `new` tokens of all rows.
    fn painted(&self, rows: &[(&Sequence, usize)], layer: usize, new: usize) -> [Tensor; 3] {
        let of =
            |(s, _): &(&Sequence, usize)| self.host.model.qkv(&s.text, layer, s.past, s.past + new);
        let all: Vec<[Tensor; 3]> = rows.iter().map(of).collect();
        [0, 1, 2].map(|i| Tensor::cat(&all.iter().map(|x| &x[i]).collect::<Vec<_>>(), 0).unwrap())
    }

    /// One row's keys are not finite in one layer: its sequence ends with an error, and the step stands for the others.
    fn bad(&mut self, prompt: bool, who: usize, bad: usize) {
        if !prompt {
            self.grow(1);
        }
        let rows = self.rows(prompt, if prompt { 40 } else { 1 });
        let longest = rows.iter().map(|row| row.2).max().unwrap_or(0);
        if rows.is_empty() {
            return;
        }
        let who = who % rows.len();
        let view: Vec<_> = rows.iter().map(|(_, s, new)| (s, *new)).collect();
        let Ok(step) = self.host.begin(prompt, &view) else {
            return;
        };
        let mut out = vec![];
        for layer in 0..LAYERS {
            let [q, k, v] = self.painted(&view, layer, longest);
            let k = match layer == bad {
                true => {
                    let parts = (0..rows.len()).map(|i| {
                        let row = k.narrow(0, i, 1).unwrap();
                        if i == who {
                            (row * f64::NAN).unwrap()
                        } else {
                            row
                        }
                    });
                    Tensor::cat(&parts.collect::<Vec<_>>(), 0).unwrap()
                }
                false => k,
            };
            let attn = self.host.model.attn;
            out.push(match prompt {
                true => {
                    let attended = step.prefill(layer, &q, &k, &v, attn).unwrap();
                    step.append(layer, &q, &k, &v).unwrap();
                    attended
                }
                false => Some(step.decode(layer, &q, &k, &v, attn).unwrap()),
            });
        }
        let faults = self.host.cache.end_step().unwrap();
        let told: Vec<usize> = faults.iter().map(|fault| fault.seq).collect();
        assert_eq!(told, [rows[who].1.id], "{faults:?}");
        assert!(
            faults[0].error.contains(&format!("layer {bad}")),
            "{faults:?}"
        );
        let pages = self.begun(&rows);
        let mut after = rows.clone();
        for (i, ((at, s, new), pages)) in after.iter_mut().zip(&pages).enumerate() {
            let past = s.past;
            s.past += *new;
            if i != who {
                let s = s.clone();
                self.written(*at, &s, past, *pages);
            }
        }
        self.check_attention(&rows, &pages, prompt, &out, Some(who));
        for (i, (at, s, _)) in after.into_iter().enumerate() {
            if i != who {
                self.accepted(at, s, 0);
            }
        }
        self.saw("a row was bad", rows.len() > 1);
        self.end(rows[who].0);
    }

    fn preempt(&mut self, i: usize) {
        let s = &self.live[i];
        let tokens = s.prompt.max(s.stored.past);
        self.waiting.push((s.stored.text.clone(), tokens));
        self.saw("preempted", true);
        self.end(i);
    }

    fn end(&mut self, i: usize) {
        let s = self.live.remove(i).stored;
        self.released(s.id, &s.blocks);
    }

    /// What is in nobody's window any more is a page if it is full, and gone if it is not.
    fn released(&mut self, seq: usize, given: &[usize]) {
        let lost = self.host.cache.released(seq, given);
        assert!(
            lost.is_empty(),
            "blocks that could be hit are gone: {lost:?}"
        );
        let live = self.live.iter_mut().find(|live| live.stored.id == seq);
        let mut path = vec![];
        if let Some(window) = live.and_then(|live| live.window.as_mut()) {
            window.retain(|block| !given.contains(block));
            path.clone_from(window);
        }
        path.extend(given);
        let (group, live) = (self.rules.group, &self.live);
        let held = |block: &usize| live.iter().any(|live| live.holds(*block));
        let full = |block: &usize| {
            self.blocks
                .get(block)
                .is_some_and(|b| b.page || b.prefix.end.is_multiple_of(group))
        };
        let shared = given.iter().any(|block| held(block) && full(block));
        let last = path
            .iter()
            .rposition(|block| full(block) && !held(block) && !self.blocks[block].page);
        for block in &path[..last.map_or(0, |i| i + 1)] {
            self.blocks.get_mut(block).unwrap().page = true;
        }
        self.saw("stays in another's window", shared);
        given.iter().for_each(|block| self.let_go(*block));
        self.pool.free(given);
    }

    /// All sequences end, and then all blocks are handed out: nothing is left.
    pub fn come_to_rest(&mut self) {
        while !self.live.is_empty() {
            self.end(0);
        }
        self.check();
        assert!(self.pool.is_at_rest());
        assert!(self.blocks.values().all(|held| held.page && !held.open));
        let all: Vec<usize> = (1..NUM_BLOCKS).collect();
        self.handed_out(0, &all);
        self.check();
    }
}
