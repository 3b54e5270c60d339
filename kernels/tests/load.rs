//! Chat loads against the life of blocks, with a memory that holds names of tokens in the place of numbers: many clients
//! ask about few documents at about the same time, answers grow, the pool is too small, steps break off and rows have
//! faults. Whatever a row reads, before its new tokens are stored and after, must be its own tokens, and each page is made
//! once in a step. `teeth_of_blocks.rs` puts faults into the life of blocks that this must notice.

use std::collections::{HashMap, HashSet, VecDeque};

use ott_kernels::blocks::{Blocks, Refused, Row, RowPlan, Stored, CHUNK};

const LAYERS: usize = 2;
const MAX_SEQS: usize = 16;

/// Random numbers: splitmix64.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
}

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// One layer: a token's name follows from all tokens up to it.
struct Layer {
    chunks: Vec<[u64; CHUNK]>,
    pages: Vec<Vec<u64>>,
}

impl Layer {
    /// Tokens of a row as it finds them.
    fn read(&self, stored: &Stored<'_>, group: usize) -> Vec<u64> {
        let pages = stored.table[..stored.pages].iter();
        let mut tokens: Vec<u64> = pages.flat_map(|b| self.pages[*b].clone()).collect();
        let chunks = stored.chunks.iter();
        tokens.extend(chunks.flat_map(|chunk| self.chunks[*chunk as usize]));
        assert!(tokens.len() >= stored.tokens && stored.pages * group <= stored.tokens);
        tokens.truncate(stored.tokens);
        tokens
    }

    /// Make a row's pages; `new` are the names of its new tokens.
    fn seal(&mut self, row: &RowPlan, new: &[u64], group: usize) {
        for i in row.pages_before..row.pages {
            let first = row.pages_before * group;
            let token = |t: usize| match t.checked_sub(row.past) {
                Some(t) => new[t],
                None => self.chunks[row.chunks_before[(t - first) / CHUNK] as usize][t % CHUNK],
            };
            let page: Vec<u64> = (i * group..(i + 1) * group).map(token).collect();
            self.pages[row.table[i]] = page;
        }
    }

    fn store(&mut self, row: &RowPlan, new: &[u64], group: usize) {
        let first = row.pages * group;
        for (t, name) in (row.past..).zip(new).filter(|(t, _)| *t >= first) {
            let chunk = row.chunks[(t - first) / CHUNK];
            self.chunks[chunk as usize][t % CHUNK] = *name;
        }
    }
}

/// One request.
#[derive(Clone)]
struct Request {
    /// Names of the prompt's tokens and of all that will be said.
    names: Vec<u64>,
    prompt: usize,
}

struct Running {
    id: usize,
    request: Request,
    table: Vec<usize>,
    past: usize,
}

/// The host's side, as mistral.rs 0.8.1 does it.
struct Host {
    group: usize,
    blocks: Blocks,
    layers: Vec<Layer>,
    refs: Vec<usize>,
    free: VecDeque<usize>,
    hashes: Vec<Option<u64>>,
    by_hash: HashMap<u64, usize>,
    running: Vec<Running>,
    waiting: VecDeque<Request>,
    ids: usize,
    rng: Draw,
    seen: Seen,
}

#[derive(Debug, Default)]
struct Seen {
    requests: usize,
    hits: usize,
    /// Hits of blocks that had no page yet.
    open: usize,
    preempted: usize,
    aborted: usize,
    faults: usize,
    wrong: usize,
}

impl Host {
    fn new(num_blocks: usize, group: usize, residual: usize, seed: u64) -> Self {
        let chunks = MAX_SEQS * (group + residual) / CHUNK;
        let layer = || Layer {
            chunks: vec![[0; CHUNK]; chunks],
            pages: vec![vec![]; num_blocks],
        };
        Self {
            group,
            blocks: Blocks::new(num_blocks, chunks, group, residual),
            layers: (0..LAYERS).map(|_| layer()).collect(),
            refs: vec![0; num_blocks],
            free: (1..num_blocks).collect(),
            hashes: vec![None; num_blocks],
            by_hash: HashMap::new(),
            running: vec![],
            waiting: VecDeque::new(),
            ids: 0,
            rng: Draw(seed),
            seen: Seen::default(),
        }
    }

    fn forget(&mut self, block: usize) {
        if let Some(hash) = self.hashes[block].take() {
            if self.by_hash.get(&hash) == Some(&block) {
                self.by_hash.remove(&hash);
            }
        }
    }

    fn take(&mut self, count: usize) -> Option<Vec<usize>> {
        if count > self.free.len() {
            return None;
        }
        let new: Vec<usize> = self.free.drain(..count).collect();
        for &block in &new {
            self.forget(block);
            self.refs[block] = 1;
        }
        self.blocks.allocated(&new);
        Some(new)
    }

    /// Register the full blocks of a sequence's computed tokens.
    fn computed(&mut self, i: usize) {
        let running = &self.running[i];
        for (g, &block) in running.table[..running.past / self.group]
            .iter()
            .enumerate()
        {
            let hash = running.request.names[(g + 1) * self.group - 1];
            if self.hashes[block].is_none() {
                self.hashes[block] = Some(hash);
                self.by_hash.insert(hash, block);
            }
        }
    }

    /// Take a request in, if there is room: what it hits and new blocks for its prompt.
    fn admit(&mut self) -> bool {
        let Some(request) = self.waiting.front().cloned() else {
            return false;
        };
        let groups = (request.prompt - 1) / self.group;
        let names = (1..=groups).map(|g| request.names[g * self.group - 1]);
        let hit: Vec<usize> = names
            .map_while(|name| self.by_hash.get(&name).copied())
            .collect();
        let new = request.prompt.div_ceil(self.group) - hit.len();
        let revived = hit.iter().filter(|b| self.refs[**b] == 0).count();
        if self.running.len() == MAX_SEQS || new + revived > self.free.len() {
            return false;
        }
        self.waiting.pop_front();
        self.free.retain(|b| !hit.contains(b));
        hit.iter().for_each(|b| self.refs[*b] += 1);
        self.seen.hits += hit.len();
        self.seen.open += hit.iter().filter(|b| !self.blocks.is_page(**b)).count();
        let new = self.take(new).expect("counted");
        self.ids += 1;
        self.running.push(Running {
            id: self.ids,
            past: hit.len() * self.group,
            table: [hit, new].concat(),
            request,
        });
        true
    }

    fn end(&mut self, i: usize) {
        let ended = self.running.remove(i);
        let (layers, group) = (&mut self.layers, self.group);
        let lost = self.blocks.released(ended.id, &ended.table, |wave| {
            sealed_by(layers, wave, group);
            Ok::<_, Refused>(())
        });
        assert!(lost.is_empty(), "nothing fails here that was stored before");
        for &block in ended.table.iter().rev() {
            self.refs[block] -= 1;
            if self.refs[block] == 0 {
                self.free.push_back(block);
            }
        }
    }

    /// Room for the next token of all; who gets none is computed anew later.
    fn grow(&mut self) {
        let mut i = 0;
        while i < self.running.len() {
            let running = &self.running[i];
            if running.past < running.table.len() * self.group {
                i += 1;
                continue;
            }
            match self.take(1) {
                Some(new) => self.running[i].table.extend(new),
                None => {
                    self.seen.preempted += 1;
                    let last = self.running.len() - 1;
                    let mut request = self.running[last].request.clone();
                    request.prompt = request.prompt.max(self.running[last].past);
                    self.waiting.push_front(request);
                    self.end(last);
                }
            }
        }
    }

    /// One forward pass of all prompts, or else of all others.
    fn step(&mut self) {
        let prompt = self.running.iter().any(|r| r.past < r.request.prompt);
        if !prompt {
            self.grow();
        }
        let part: Vec<usize> = (0..self.running.len())
            .filter(|i| !prompt || self.running[*i].past < self.running[*i].request.prompt)
            .collect();
        if part.is_empty() {
            return;
        }
        let new = |r: &Running| if prompt { r.request.prompt - r.past } else { 1 };
        let rows: Vec<Row<'_>> = part
            .iter()
            .map(|i| &self.running[*i])
            .map(|r| Row {
                seq: r.id,
                past: r.past,
                new: new(r),
                table: &r.table,
            })
            .collect();
        let seals = if self.rng.below(50) == 0 { 1 } else { LAYERS };
        let (layers, group) = (&mut self.layers[..seals], self.group);
        let mut sealed = HashSet::new();
        let plans = self.blocks.begin(&rows, |wave| {
            for row in wave {
                assert!(
                    sealed.insert(row.table[row.pages_before]),
                    "a page is made twice"
                );
            }
            sealed_by(layers, wave, group);
            // A device that fails has some layers' pages made.
            match seals {
                LAYERS => Ok(()),
                _ => Err(Refused::Empty),
            }
        });
        let Ok(plans) = plans else {
            assert!(seals < LAYERS, "blocks and chunks are there: {plans:?}");
            self.seen.aborted += 1;
            part.into_iter().rev().for_each(|i| self.end(i));
            return;
        };
        let breaks = self.rng.below(100) == 0;
        let fault = (self.rng.below(150) == 0).then(|| self.rng.below(part.len()));
        for layer in &mut self.layers[..if breaks { 1 } else { LAYERS }] {
            let names = |i: usize| &self.running[part[i]].request.names;
            let all = |row: &RowPlan, i: usize| names(i)[row.past..row.end()].to_vec();
            for (i, row) in plans.iter().enumerate() {
                let read = layer.read(&row.before(), group);
                self.seen.wrong += usize::from(read[..] != names(i)[..row.past]);
            }
            for (i, row) in plans.iter().enumerate() {
                layer.seal(row, &all(row, i), group);
            }
            for (i, row) in plans.iter().enumerate() {
                layer.store(row, &all(row, i), group);
            }
            for (i, row) in plans.iter().enumerate() {
                let read = layer.read(&row.after(), group);
                self.seen.wrong += usize::from(read[..] != names(i)[..row.end()]);
            }
        }
        if breaks {
            // The host ends all sequences of the step.
            self.seen.aborted += 1;
            part.into_iter().rev().for_each(|i| self.end(i));
            return;
        }
        self.blocks.end(|row| Some(row) == fault);
        for (row, &i) in plans.iter().zip(&part) {
            self.running[i].past = row.end();
        }
        if let Some(row) = fault {
            self.seen.faults += 1;
            self.running[part[row]].past = plans[row].past;
        }
        for &i in &part {
            self.computed(i);
        }
        if let Some(row) = fault {
            self.end(part[row]);
        }
        for i in (0..self.running.len()).rev() {
            if self.running[i].past == self.running[i].request.names.len() {
                self.end(i);
            }
        }
    }
}

fn sealed_by(layers: &mut [Layer], wave: &[RowPlan], group: usize) {
    for layer in layers {
        // In any order: on a GPU a wave is made at once.
        wave.iter()
            .rev()
            .for_each(|row| layer.seal(row, &[], group));
    }
}

/// Each document is asked about `times` times at about the same time.
fn load(group: usize, residual: usize, times: usize, requests: usize) -> Seen {
    let mut host = Host::new(60 * 128 / group, group, residual, 17 + times as u64);
    let mut asked: VecDeque<Request> = VecDeque::new();
    let mut name = 0;
    while host.seen.requests < requests || !host.running.is_empty() || !host.waiting.is_empty() {
        if host.seen.requests < requests && host.rng.below(3) == 0 {
            if asked.is_empty() {
                let document = 60 + host.rng.below(500);
                let seed = host.rng.next();
                for _ in 0..times {
                    let (question, answer) = (1 + host.rng.below(60), 1 + host.rng.below(250));
                    let own = host.rng.next();
                    let token = |i: usize| if i < document { seed } else { own };
                    let names = (0..document + question + answer).scan(1, |before: &mut u64, i| {
                        *before = mix(*before ^ token(i).rotate_left(i as u32 % 60));
                        Some(*before)
                    });
                    asked.push_back(Request {
                        names: names.collect(),
                        prompt: document + question,
                    });
                }
            }
            for _ in 0..1 + host.rng.below(3) {
                if let Some(request) = asked.pop_front() {
                    host.seen.requests += 1;
                    name += 1;
                    host.waiting.push_back(request);
                }
            }
        }
        while host.admit() {}
        host.step();
    }
    assert_eq!(name, host.seen.requests);
    let counts = host.blocks.counts();
    assert_eq!(
        (counts.chunks, counts.window),
        (0, 0),
        "nothing is left in a window"
    );
    host.seen
}

#[test]
fn no_request_reads_tokens_that_are_not_its_own() {
    for (point, group, residual) in [
        ("default", 128, 32),
        ("3bit", 128, 64),
        ("kivi", 128, 128),
        ("group=32", 32, 32),
    ] {
        for times in [1, 2, 4, 8] {
            let requests = std::env::var("OTT_LOAD_REQUESTS").ok();
            let requests = requests.and_then(|n| n.parse().ok()).unwrap_or(300);
            let seen = load(group, residual, times, requests);
            println!("{point}, {times} at once: {seen:?}");
            assert_eq!(seen.wrong, 0, "{point}, {times} at once");
            assert!(seen.aborted > 0 && seen.faults > 0, "{seen:?}");
            assert!(times == 1 || seen.open > 0, "{seen:?}");
        }
    }
}
