//! A failed step ends its request with an error, and the others go on.

use anyhow::{bail, Result};
use integration_tests::engine::{prompt, Engine, Setup};
use integration_tests::model::smollm2;

use crate::{alone, block_on};

#[test]
fn a_failing_backend_ends_its_request_and_the_engine_goes_on() -> Result<()> {
    let _alone = alone();
    block_on(async {
        // Step 0 is the host's own, after loading.
        for fault in [
            "fail_layer=7,fail_after_steps=2",
            "fail_after_steps=1",
            "fail_layer=0,fail_after_steps=3",
        ] {
            let engine =
                Engine::load(&smollm2()?, &Setup::with(&format!("toy-faulty:{fault}"))).await?;
            let error = match engine.complete(prompt(10, 1), 8).await {
                Ok(answer) => bail!("{fault}: no step failed: {answer:?}"),
                Err(error) => error.to_string(),
            };
            assert!(error.contains("toy-faulty"), "{fault}: {error}");
            let next = engine.complete(prompt(10, 1), 8).await?;
            assert_eq!(next.tokens.len(), 8, "{fault}");
        }
        Ok(())
    })
}

/// Eight sequences decode together, and one of them has numbers that cannot be kept: it gets the error, and the others
/// the answers that they get alone.
#[test]
fn a_row_with_a_fault_ends_alone() -> Result<()> {
    let _alone = alone();
    block_on(async {
        // Step 0 is the host's own, step 1 the prompts'.
        let setup = Setup::with("toy-faulty:fail_row=2,fail_after_steps=4");
        let engine = Engine::load(&smollm2()?, &setup).await?;
        let all = (0..8).map(|i| engine.complete(prompt(20, i), 8));
        let answers = futures::future::join_all(all).await;
        let errors: Vec<String> = answers
            .iter()
            .filter_map(|answer| Some(answer.as_ref().err()?.to_string()))
            .collect();
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(
            errors[0].contains("a row of step 4 fails, as asked"),
            "{errors:?}"
        );
        for (i, answer) in answers.into_iter().enumerate() {
            let Ok(answer) = answer else { continue };
            let alone = engine.complete(prompt(20, i as u32), 8).await?;
            assert_eq!(answer.tokens, alone.tokens, "sequence {i}");
        }
        Ok(())
    })
}

#[test]
fn a_request_that_cannot_fit_gets_an_error() -> Result<()> {
    let _alone = alone();
    block_on(async {
        let small = Setup {
            pool_tokens: 256,
            ..Setup::with("ott")
        };
        let engine = Engine::load(&smollm2()?, &small).await?;
        let (long, short) = tokio::join!(
            engine.complete(prompt(700, 1), 4),
            engine.complete(prompt(20, 1), 4)
        );
        let error = long
            .expect_err("700 tokens do not fit a pool of 256")
            .to_string();
        assert!(error.contains("needs room for 700 tokens"), "{error}");
        assert_eq!(short?.tokens.len(), 4);
        Ok(())
    })
}
