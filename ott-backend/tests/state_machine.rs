//! A model of the cache, and random histories of a host against it: sequences that come, hit each
//! other's blocks, grow in batches, lose drafted tokens, are preempted, fail alone or with their step,
//! and end, in a pool that is too small for them. `kernels/tests/shim` runs the same histories on the
//! CUDA cache. After every operation each sequence reads back what the paper's rules say
//! (`reference`), pages of one prefix are equal byte for byte, and the counts of pages, chunks and
//! traced tokens are the model's.

mod harness;
mod machine;
mod pool;
mod reference;

use std::sync::{Mutex, PoisonError};

use machine::{
    once_wrong, op, Machine, Op, Seen, Setting, Subject, BOOSTED, LARGER, NO_WINDOW, NUM_BLOCKS,
    PLAIN,
};
use mistralrs_kv_backend::KvBackendProvider;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

/// Attention in f32 against f64: as in `cache`.
const F32: f64 = 2e-4;

/// The cache on the CPU.
fn subject(options: &str) -> Subject {
    static OPENING: Mutex<()> = Mutex::new(());
    let model = machine::model(options);
    let memory = ott_backend::provider().memory(&model.shape()).unwrap();
    let _one_by_one = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
    Subject {
        host: model.host(NUM_BLOCKS),
        inspect: ott_backend::provider().caches().pop().unwrap(),
        answered: memory.per_block * NUM_BLOCKS + memory.fixed,
    }
}

fn run((options, rules): Setting<'_>, seed: u64, ops: &[Op]) -> Seen {
    let mut machine = Machine::new(subject(options), rules, seed, F32);
    ops.iter().for_each(|op| machine.apply(*op));
    machine.come_to_rest();
    machine.seen
}

proptest! {
    #![proptest_config(harness::proptest_config())]

    #[test]
    fn any_history(seed in 0u64..1000, ops in vec(op(), 1..50)) {
        run(PLAIN, seed, &ops);
    }

    #[test]
    fn any_history_without_a_window(seed in 0u64..1000, ops in vec(op(), 1..50)) {
        run(NO_WINDOW, seed, &ops);
    }

    #[test]
    fn any_history_boosted_and_rotated(seed in 0u64..1000, ops in vec(op(), 1..50)) {
        run(BOOSTED, seed, &ops);
    }

    #[test]
    fn any_history_of_larger_groups(seed in 0u64..1000, ops in vec(op(), 1..50)) {
        run(LARGER, seed, &ops);
    }
}

/// Two sequences store the same beginning in blocks of their own, and a third hits some of each. When
/// the first ends, what the third reads of it is there.
#[test]
fn a_hit_may_mix_the_blocks_of_two_sequences() {
    let start = |text, tokens| Op::Start {
        text,
        tokens,
        pick: 1,
    };
    let history = [
        start(1, 90),
        start(5, 40),
        Op::Prompt { tokens: 64 },
        start(1, 65),
        Op::End { who: 0 },
        Op::Prompt { tokens: 1 },
        Op::Decode {
            tokens: 1,
            rejected: 0,
        },
    ];
    run(PLAIN, 3, &history);
}

#[test]
fn what_once_went_wrong_goes_right() {
    for (what, history) in once_wrong() {
        println!("{what}");
        run(PLAIN, 1, &history);
    }
}

/// One sequence more than the window was sized for: the step is refused as a whole.
#[test]
fn a_step_without_room_changes_nothing() {
    let start = |tokens| Op::Start {
        text: 0,
        tokens,
        pick: 0,
    };
    let history = [
        start(64),
        start(64),
        start(64),
        start(64),
        Op::Prompt { tokens: 64 },
        Op::Decode {
            tokens: 3,
            rejected: 0,
        },
    ];
    assert_eq!(run(LARGER, 0, &history)["no room for the window"], 1);
}

/// One more sequence than the window was sized for, and the block that one of them would seal lies before a block that
/// another one seals in the same step, so that it stays open. The step is refused as a whole.
#[test]
fn a_step_counts_what_its_own_pages_leave_open() {
    let start = |text, tokens, pick| Op::Start { text, tokens, pick };
    let history = [
        start(1, 97, 0),
        start(0, 1, 0),
        start(0, 33, 0),
        Op::Prompt { tokens: 76 },
        start(0, 1, 0),
        start(1, 65, 1),
        Op::Prompt { tokens: 21 },
    ];
    assert_eq!(run(PLAIN, 0, &history)["no room for the window"], 1);
}

/// The histories above reach what they are for.
#[test]
fn histories_reach_every_corner() {
    let mut runner = TestRunner::deterministic();
    let mut seen = Seen::new();
    for seed in 0..60 {
        let ops = vec(op(), 30..50).new_tree(&mut runner).unwrap().current();
        for (what, times) in run(PLAIN, seed, &ops) {
            *seen.entry(what).or_default() += times;
        }
    }
    println!("{seen:?}");
    assert_eq!(seen.len(), 10);
    assert!(seen.values().all(|times| *times >= 3), "{seen:?}");
}
