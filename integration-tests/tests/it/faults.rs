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
