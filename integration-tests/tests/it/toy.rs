//! The seam is right if a full-precision backend behind it answers as the host's own cache does.

use anyhow::Result;
use integration_tests::engine::{prompt, Answer, Engine, Setup};
use integration_tests::model::smollm2;

use crate::{alone, block_on};

/// Around a block of 128 tokens, and around a block and a window of 32.
const LENGTHS: [usize; 7] = [1, 5, 127, 128, 129, 160, 161];
const NEW: usize = 6;

async fn one_by_one(engine: &Engine) -> Result<Vec<Answer>> {
    let mut answers = Vec::new();
    for len in LENGTHS {
        answers.push(engine.complete(prompt(len, 7), NEW).await?);
    }
    Ok(answers)
}

async fn at_once(engine: &Engine) -> Result<Vec<Answer>> {
    let [a, b, c, d] = [5, 127, 129, 161].map(|len| engine.complete(prompt(len, 7), NEW));
    let (a, b, c, d) = tokio::try_join!(a, b, c, d)?;
    Ok(vec![a, b, c, d])
}

fn texts(answers: &[Answer]) -> Vec<Vec<&str>> {
    answers
        .iter()
        .map(|a| a.tokens.iter().map(|(t, _)| t.as_str()).collect())
        .collect()
}

#[test]
fn toy_backend_equals_the_hosts_own_cache_token_for_token() -> Result<()> {
    let _alone = alone();
    block_on(async {
        let path = smollm2()?;
        let eager = one_by_one(&Engine::load(&path, &Setup::default()).await?).await?;
        for prefix_cache in [false, true] {
            let setup = Setup {
                prefix_cache,
                ..Setup::with("toy-f32")
            };
            let engine = Engine::load(&path, &setup).await?;
            let toy = one_by_one(&engine).await?;
            assert_eq!(
                texts(&toy),
                texts(&eager),
                "one by one, prefix cache {prefix_cache}"
            );
            let again = one_by_one(&engine).await?;
            assert_eq!(
                texts(&again),
                texts(&eager),
                "again, prefix cache {prefix_cache}"
            );
            // Unequal prompts at once equal their results alone (the host's own batched CPU decode
            // does not: docs/testing.md).
            let batch = at_once(&engine).await?;
            let alone = [1, 2, 4, 6].map(|i| eager[i].clone());
            assert_eq!(
                texts(&batch),
                texts(&alone),
                "at once, prefix cache {prefix_cache}"
            );
        }
        Ok(())
    })
}

/// A preempted sequence computes its keys and values again in one prompt instead of token by token: sums of
/// another order, rounded to f16, and to 8 bits before each matmul. So log-probabilities may differ by this much
/// (measured: 0.03; with a block mixed up, by units), and a token may fall on a tie's other side.
const RECOMPUTED: f32 = 0.1;

fn assert_same_but_for_ties(found: &Answer, expected: &Answer) {
    assert_eq!(found.tokens.len(), expected.tokens.len());
    for (a, b) in found.tokens.iter().zip(&expected.tokens) {
        assert!(
            (a.1 - b.1).abs() < RECOMPUTED,
            "{a:?} and {b:?} in {found:?} / {expected:?}"
        );
        if a.0 != b.0 {
            return;
        }
    }
}

#[test]
fn a_small_pool_preempts_and_loses_nothing() -> Result<()> {
    let _alone = alone();
    block_on(async {
        let path = smollm2()?;
        let roomy = Engine::load(&path, &Setup::with("toy-f32:block=16")).await?;
        let small = Setup {
            pool_tokens: 96,
            prefix_cache: true,
            ..Setup::with("toy-f32:block=16")
        };
        let small = Engine::load(&path, &small).await?;
        let mut expected = Vec::new();
        for seed in 0..4 {
            expected.push(roomy.complete(prompt(20, seed), 24).await?);
        }
        let [a, b, c, d] = [0, 1, 2, 3].map(|seed| small.complete(prompt(20, seed), 24));
        let (a, b, c, d) = tokio::try_join!(a, b, c, d)?;
        for (found, expected) in [a, b, c, d].iter().zip(&expected) {
            assert_same_but_for_ties(found, expected);
        }
        Ok(())
    })
}
