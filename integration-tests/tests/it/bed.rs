//! Many clients at once over HTTP, in a pool too small for all: `cargo soak` in short.

use std::time::Duration;

use anyhow::Result;
use integration_tests::bed::{agree, Answer, Bed, Choice, Length, Outcome, TIE};
use integration_tests::model::smollm2;
use integration_tests::server::Server;

use crate::alone;

const BED: Bed = Bed {
    seed: 1,
    distinct: 8,
    length: Length::Full,
    requests: 24,
    time: Duration::from_secs(120),
    clients: 8,
    judged_tokens: usize::MAX,
    budget: TIE,
    faults: false,
};

fn run(bed: &Bed, server: &Server) -> Result<Outcome> {
    let outcome = bed.run(server)?;
    println!("{outcome:#?}");
    assert!(outcome.wrong.is_empty(), "{:#?}", outcome.wrong);
    assert!(outcome.ties * 10 <= outcome.judged, "{} ties", outcome.ties);
    assert_eq!(outcome.report["failed_steps"], 0);
    Ok(outcome)
}

/// Every answer is what it is alone, also of sequences that were preempted or hit the blocks of others.
#[test]
fn a_storm_on_a_small_pool_in_full_precision() -> Result<()> {
    let _alone = alone();
    let options = [
        "--kv-cache",
        "toy-f32:block=16",
        "--pa-context-len",
        "256",
        "--max-seqs",
        "6",
    ];
    let server = Server::start_toys(&smollm2()?, &options)?;
    let outcome = run(&BED, &server)?;
    for what in ["preempted", "evicted_blocks", "hit_tokens"] {
        let times = outcome.report[what].as_u64();
        assert!(times > Some(0), "{what}: {times:?}");
    }
    Ok(())
}

/// Who runs beside a sequence changes nothing of what is stored of it.
#[test]
fn a_storm_on_quantized_pages() -> Result<()> {
    let _alone = alone();
    let options = [
        "--kv-cache",
        "ott:group=32",
        "--pa-context-len",
        "4096",
        "--max-seqs",
        "4",
        "--prefix-cache-n",
        "0",
    ];
    let server = Server::start(&smollm2()?, &options)?;
    let bed = Bed { seed: 2, ..BED };
    let outcome = run(&bed, &server)?;
    assert_eq!(outcome.judged, outcome.answered);
    assert_eq!(outcome.report["evicted_blocks"], 0, "the pool holds all");
    Ok(())
}

/// With hits, preemption and eviction, everything is answered, and what stays in the window is as alone.
#[test]
fn a_storm_on_a_small_pool_of_quantized_pages() -> Result<()> {
    let _alone = alone();
    let options = [
        "--kv-cache",
        "ott:group=32",
        "--pa-context-len",
        "192",
        "--max-seqs",
        "6",
    ];
    let server = Server::start(&smollm2()?, &options)?;
    let bed = Bed {
        seed: 3,
        judged_tokens: 31,
        ..BED
    };
    let outcome = run(&bed, &server)?;
    for what in ["preempted", "evicted_blocks", "hit_tokens"] {
        let times = outcome.report[what].as_u64();
        assert!(times > Some(0), "{what}: {times:?}");
    }
    Ok(())
}

fn answer(tokens: &[(&str, f32)]) -> Answer {
    let choice = Choice {
        text: tokens.iter().map(|t| t.0).collect(),
        tokens: tokens.iter().map(|t| (t.0.to_owned(), t.1)).collect(),
        finish: "length".into(),
    };
    Answer {
        choices: vec![choice],
        tokens: 9,
    }
}

#[test]
fn answers_may_part_at_ties_only() {
    let one = answer(&[("a", 0.1), ("b", 0.7)]);
    let near = answer(&[("a", 0.12), ("c", 0.72)]);
    let far = answer(&[("a", 0.1), ("b", 1.7)]);
    let short = answer(&[("a", 0.1)]);
    assert!(agree(&one, &one, TIE).is_ok_and(|v| !v.tie));
    assert!(agree(&one, &near, TIE).is_ok_and(|v| v.tie));
    assert!(agree(&one, &far, TIE).is_err());
    assert!(agree(&one, &short, TIE).is_err());
}
