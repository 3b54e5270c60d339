//! Random histories of a host against the CUDA cache under the shim: those of `ott-backend/tests/state_machine.rs`, judged by
//! the same model. `PROPTEST_CASES` says how many.

use proptest::collection::vec;
use proptest::prelude::*;

use crate::harness::proptest_config;
use crate::kernels::{kernels, THREADS_COPY};
use crate::machine::{
    model, once_wrong, op, Machine, Op, Setting, BOOSTED, LARGER, NO_WINDOW, PLAIN,
};
use crate::reference::Rules;
use crate::subject::{subject, Tells};

/// Attention in f32, with approximate exponentials, against f64.
const F32: f64 = 4e-4;

fn run(setting: Setting<'_>, seed: u64, ops: &[Op]) {
    run_told(Tells::AtOnce, setting, seed, ops);
}

fn run_told(tells: Tells, (options, rules): Setting<'_>, seed: u64, ops: &[Op]) {
    let kernels = kernels(THREADS_COPY, &[], &[], seed).expect("compiles");
    let subject = subject(kernels, model(options), tells);
    let mut machine = Machine::new(subject, rules, seed, F32);
    ops.iter().for_each(|op| machine.apply(op.of_one_token()));
    machine.come_to_rest();
}

proptest! {
    #![proptest_config(proptest_config())]

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

#[test]
fn what_once_went_wrong_goes_right() {
    let (options, rules) = PLAIN;
    let boosted = format!("{options},boost=12");
    for (what, history) in once_wrong() {
        println!("{what}");
        run(PLAIN, 1, &history);
        run((&boosted, Rules { boost: 12, ..rules }), 1, &history);
    }
}

/// A fault that is told with the step after its own, as it once was.
#[test]
fn faults_that_are_told_late_are_found() {
    let (_, history) = once_wrong().swap_remove(4);
    let late = || run_told(Tells::Late, PLAIN, 1, &history);
    assert!(std::panic::catch_unwind(late).is_err());
}
