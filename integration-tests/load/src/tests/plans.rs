//! Plans and prompts are functions of the seed; percentiles against their definition.

use std::collections::HashSet;
use std::io::Write;

use crate::draw::Draw;
use crate::plan::{plan, Load};
use crate::prompt::Prompts;
use crate::stats::{percentile, Spread};

fn load(text: &str) -> Load {
    text.parse().unwrap()
}

/// The least of the numbers that so many in a hundred do not exceed, found by counting for each.
fn by_definition(numbers: &[f64], percent: usize) -> f64 {
    let enough =
        |x: &&f64| 100 * numbers.iter().filter(|y| *y <= *x).count() >= percent * numbers.len();
    numbers
        .iter()
        .filter(enough)
        .copied()
        .fold(f64::INFINITY, f64::min)
}

#[test]
fn percentiles_are_what_their_definition_says() {
    let mut draw = Draw::new(3, 0);
    for n in (1..60).chain([99, 100, 101, 1000]) {
        // Few values, so that some are equal.
        let mut numbers: Vec<f64> = (0..n).map(|_| draw.below(40) as f64).collect();
        let spread = Spread::of(&mut numbers.clone()).unwrap();
        let found = [spread.p50, spread.p95, spread.p99, spread.max];
        assert_eq!(
            found,
            [50, 95, 99, 100].map(|p| by_definition(&numbers, p)),
            "{n}"
        );
        numbers.sort_by(f64::total_cmp);
        for percent in 1..=100 {
            assert_eq!(
                percentile(&numbers, percent),
                by_definition(&numbers, percent)
            );
        }
    }
    assert_eq!(Spread::of(&mut []), None);
}

#[test]
fn arrivals_are_poisson_and_a_function_of_the_seed() {
    let open = load("open:5:20000:16-64/4-8");
    let requests = plan(&open, 7, 4);
    assert_eq!(requests, plan(&open, 7, 4));
    assert_ne!(requests, plan(&open, 8, 4));
    let waits: Vec<f64> = std::iter::once(requests[0].at)
        .chain(requests.windows(2).map(|pair| pair[1].at - pair[0].at))
        .collect();
    let n = waits.len() as f64;
    let mean = waits.iter().sum::<f64>() / n;
    // Five standard errors: the seed is fixed, so this holds always or never.
    assert!((mean * 5.0 - 1.0).abs() < 5.0 / n.sqrt(), "{mean}");
    // Of exponential waits the share e^-1 exceeds the mean, and the deviation equals it.
    let above = waits.iter().filter(|wait| **wait > 0.2).count() as f64 / n;
    assert!((above - (-1f64).exp()).abs() < 0.02, "{above}");
    let deviation = (waits.iter().map(|w| (w - mean).powi(2)).sum::<f64>() / n).sqrt();
    assert!((deviation / mean - 1.0).abs() < 0.05, "{deviation} {mean}");
}

#[test]
fn lengths_are_log_uniform_and_do_not_depend_on_the_rate() {
    let lengths = |load: &str| -> Vec<_> {
        let requests = plan(&self::load(load), 1, 0);
        requests.iter().map(|r| (r.id, r.depth, r.tokens)).collect()
    };
    let slow = lengths("open:0.5:20000:64-1024/8-8");
    assert_eq!(slow, lengths("open:50:20000:64-1024/8-8"));
    assert_eq!(slow, lengths("closed:3:20000:64-1024/8-8"));
    assert!(slow
        .iter()
        .all(|(_, depth, tokens)| (64..=1024).contains(depth) && *tokens == 8));
    let below = slow.iter().filter(|(_, depth, _)| *depth < 256).count();
    assert!(
        (9_700..10_300).contains(&below),
        "half lie below the geometric mean: {below}"
    );
    for end in [64, 1024] {
        assert!(slow.iter().any(|(_, depth, _)| *depth == end));
    }
    // 15 % documents: of 2048 tokens and more.
    let long = lengths("open:1:20000:mixed")
        .iter()
        .filter(|(_, depth, _)| *depth >= 2048)
        .count();
    assert!((2_700..3_300).contains(&long), "{long}");
}

#[test]
fn the_first_of_a_batch_are_asked_for_more() {
    let tokens: Vec<usize> = plan(&load("batch:3x100+10"), 1, 4)
        .iter()
        .map(|r| r.tokens)
        .collect();
    assert_eq!(tokens, [18, 14, 10]);
}

#[test]
fn loads_are_read_as_they_are_written() {
    for text in [
        "batch:8x4096+64",
        "burst:2x16+8",
        "open:2.5:100:chat",
        "closed:4:10:64-1024/32",
        "open:1:9:mixed",
    ] {
        assert_eq!(load(text).to_string(), text);
    }
    let wrong = [
        "batch:8",
        "batch:0x1+2",
        "batch:1x1+1",
        "open:0:1:chat",
        "open:x:1:chat",
        "open:1:1:5-3/1",
        "open:1:1:none",
        "",
    ];
    let refusals = wrong.map(|text| format!("{:#}", text.parse::<Load>().unwrap_err()));
    insta::assert_snapshot!(refusals.join("\n"));
}

#[test]
fn prompts_are_words_of_the_model_and_all_differ() {
    let prompts = Prompts::random(1000, 1, 0).unwrap();
    let texts: HashSet<String> = (0..500).map(|id| prompts.of(id, 20)).collect();
    assert_eq!(texts.len(), 500);
    for text in &texts {
        let words: Vec<usize> = text
            .split(' ')
            .map(|word| word[1..].parse().unwrap())
            .collect();
        assert!(words.len() == 20 && words.iter().all(|word| (3..1000).contains(word)));
    }
    assert_eq!(
        prompts.of(5, 20),
        Prompts::random(1000, 1, 0).unwrap().of(5, 20)
    );
    assert_ne!(prompts.of(5, 20), prompts.reseeded(1).of(5, 20));
    // No prompt begins as another does, but for what is shared.
    let shared = Prompts::random(1000, 1, 8).unwrap();
    let words = |id, depth| {
        shared
            .of(id, depth)
            .split(' ')
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(words(1, 20)[..8], words(2, 30)[..8]);
    assert_ne!(words(1, 20)[8..], words(2, 20)[8..]);
    assert_eq!(words(1, 5).len(), 5);
    assert_ne!(words(1, 5), words(2, 5));
}

#[test]
fn pieces_of_a_text_begin_at_different_words() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let text: Vec<String> = (0..101).map(|i| format!("word{i}")).collect();
    file.write_all(text.join("\n ").as_bytes()).unwrap();
    let prompts = Prompts::text(file.path(), 5, 0).unwrap();
    let firsts: HashSet<String> = (0..100)
        .map(|id| prompts.of(id, 3).split(' ').next().unwrap().to_owned())
        .collect();
    assert_eq!(firsts.len(), 100);
    assert!(prompts.suffice(100).is_ok());
    insta::assert_snapshot!(prompts.suffice(101).unwrap_err());
    let all = prompts.of(0, 300);
    assert_eq!(all.split(' ').count(), 300, "it goes on at the beginning");
}
