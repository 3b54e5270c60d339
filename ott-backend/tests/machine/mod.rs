//! The model of the cache, and the operations of a host on both.

mod history;
mod look;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;
use mistralrs_kv_backend::KvBackendProvider;
use ott_backend::backend::Inspect;

pub use history::{op, Op};

use crate::harness::{Host, Model, Sequence, Text};
use crate::pool::{Pool, Prefix};
use crate::reference::{Rules, Token};

const LAYERS: usize = 3;
const NUM_BLOCKS: usize = 16;
/// Sequences for which the window was sized; some histories run more, and must get an error.
pub const MAX_SEQS: usize = 3;

/// What a block holds in every layer.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// The tokens up to its last one.
    prefix: Prefix,
    sealed: bool,
}

/// A running sequence.
struct Live {
    stored: Sequence,
    /// Tokens of its prompt; it is done when so many are stored.
    prompt: usize,
}

impl Live {
    fn is_prompt(&self) -> bool {
        self.stored.past < self.prompt
    }
}

/// A sealed group of the only key/value head, by the paper's rules.
struct Page {
    tokens: Vec<Token>,
    traced: usize,
}

/// How often what happened.
pub type Seen = BTreeMap<&'static str, usize>;

pub struct Machine {
    pub seen: Seen,
    rules: Rules,
    host: Host,
    inspect: Arc<dyn Inspect>,
    /// Bytes that were answered before anything was allocated.
    answered: usize,
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
    pub fn new(options: &str, rules: Rules, seed: u64) -> Self {
        let mut model = Model::new(options).heads(2, 1).dims(32, 32);
        (model.layers, model.max_seqs) = (LAYERS, MAX_SEQS);
        let memory = ott_backend::provider().memory(&model.shape()).unwrap();
        let (host, inspect) = open(&model);
        Self {
            seen: Seen::new(),
            rules,
            host,
            inspect,
            answered: memory.per_block * NUM_BLOCKS + memory.fixed,
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
        let open = hit.iter().any(|block| !self.blocks[block].sealed);
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
        let past = self.past_of(&before);
        let mut rows: Vec<_> = after.iter_mut().map(|(_, s, new)| (s, *new)).collect();
        match self.host.step_all(&mut rows, prompt) {
            Ok(out) => {
                let rejected = rejected.min(tokens - 1).min(self.rules.residual);
                after
                    .iter()
                    .for_each(|(_, s, new)| self.written(s.past - new, s));
                let past = if prompt { past } else { self.past_of(&after) };
                self.check_attention(&before, &past, &out);
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

    /// New tokens are in the blocks from `past` on, and groups with R newer ones are sealed. (But for
    /// those before a sealed block: that is another sequence's, and so they are in its window.)
    fn written(&mut self, past: usize, s: &Sequence) {
        let (group, residual) = (self.rules.group, self.rules.residual);
        let is_open = |block: &&usize| self.blocks.get(*block).is_none_or(|held| !held.sealed);
        let own = s.blocks[..past / group].iter().rev();
        let first = past / group - own.take_while(is_open).count();
        for i in first..s.past.div_ceil(group) {
            let now = Block {
                prefix: Prefix::new(&s.text, ((i + 1) * group).min(s.past)),
                sealed: (i + 1) * group + residual <= s.past,
            };
            let old = self.blocks.insert(s.blocks[i], now);
            assert!(
                old.is_none_or(|old| !old.sealed),
                "a page was written again"
            );
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
            self.released(s.id, s.blocks.last(), &surplus);
        }
        self.pool.computed(&s.text, &s.blocks, s.past);
        let live = &mut self.live[i];
        if rejected > 0 {
            live.prompt = live.prompt.min(s.past);
        }
        live.stored = s;
    }

    /// A step breaks in one layer: the host ends its sequences, and the others go on.
    fn fail(&mut self, prompt: bool, bad: usize) {
        if !prompt {
            self.grow(3);
        }
        let mut rows = self.rows(prompt, 3);
        // What is written again in some layers only is read by nobody, and no model tells its pages.
        rows.retain(|(_, s, _)| {
            let last = s.blocks.get(s.past / self.rules.group);
            let held = last.and_then(|block| self.blocks.get(block));
            held.is_none_or(|held| held.prefix.end == s.past)
        });
        if rows.is_empty() {
            return;
        }
        let view: Vec<_> = rows.iter().map(|(_, s, new)| (s, *new)).collect();
        if let Ok(step) = self.host.begin(prompt, &view) {
            for layer in 0..=bad {
                let paint = |i: usize| {
                    let part = |(s, _): &(&Sequence, usize)| {
                        let [_, k, v] = self.host.model.qkv(&s.text, layer, s.past, s.past + 3);
                        [k, v][i].clone()
                    };
                    Tensor::cat(&view.iter().map(part).collect::<Vec<_>>(), 0).unwrap()
                };
                let (k, v) = (paint(0), paint(1));
                let k = if layer == bad {
                    (k * f64::NAN).unwrap()
                } else {
                    k
                };
                assert_eq!(step.append(layer, &k, &v).is_err(), layer == bad);
            }
        }
        self.saw("a step failed", true);
        rows.iter().rev().for_each(|(i, ..)| self.end(*i));
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
        self.released(s.id, None, &s.blocks);
    }

    /// Full blocks behind sealed ones are sealed, others forgotten.
    fn released(&mut self, seq: usize, before: Option<&usize>, table: &[usize]) {
        self.host.cache.released(seq, table);
        let open_and_shared =
            |b: &usize| !self.blocks.get(b).is_none_or(|b| b.sealed) && self.pool.is_shared(*b);
        let shared = table.iter().any(open_and_shared);
        self.saw("sealed while shared", shared);
        let mut sealed = before.is_none_or(|b| self.blocks[b].sealed);
        for block in table {
            let held = self.blocks.get_mut(block);
            let full = held
                .filter(|b| b.sealed || sealed && b.prefix.end.is_multiple_of(self.rules.group));
            sealed = full.is_some();
            match full {
                Some(held) => held.sealed = true,
                None => drop(self.blocks.remove(block)),
            }
        }
        self.pool.free(table);
    }

    /// What is stored of each row, by layer.
    fn past_of(&mut self, rows: &[(usize, Sequence, usize)]) -> Vec<Vec<Vec<Token>>> {
        let mut layers = |s: &Sequence| (0..LAYERS).map(|l| self.expected(s, l)).collect();
        rows.iter().map(|(_, s, _)| layers(s)).collect()
    }

    /// All sequences end, and then all blocks are handed out: nothing is left.
    pub fn come_to_rest(&mut self) {
        while !self.live.is_empty() {
            self.end(0);
        }
        self.check();
        assert!(self.pool.is_at_rest());
        assert!(self.blocks.values().all(|held| held.sealed));
        let all: Vec<usize> = (1..NUM_BLOCKS).collect();
        self.handed_out(0, &all);
        self.check();
    }
}

/// A cache, and a look into it.
fn open(model: &Model) -> (Host, Arc<dyn Inspect>) {
    static OPENING: Mutex<()> = Mutex::new(());
    let _one_by_one = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
    let host = model.host(NUM_BLOCKS);
    let inspect = ott_backend::provider().caches().pop();
    (host, inspect.unwrap())
}
