//! `--kv-cache ott` on a real model: memory, and pages that are a function of the prefix.

use anyhow::Result;
use integration_tests::engine::{prompt, Answer, Engine, Setup};
use integration_tests::model::smollm2;

use crate::{alone, block_on};

fn agreeing(a: &Answer, b: &Answer) -> usize {
    a.tokens
        .iter()
        .zip(&b.tokens)
        .take_while(|(a, b)| a.0 == b.0)
        .count()
}

/// Pages of all sealed blocks, first traced layer, as a sorted set.
fn pages(layer: usize) -> Vec<Vec<u8>> {
    let caches = ott_backend::provider().caches();
    let cache = caches.last().expect("a model is loaded");
    let mut pages: Vec<_> = (1..64)
        .filter_map(|block| cache.page(layer, block))
        .collect();
    pages.sort();
    pages
}

#[test]
fn short_prompts_stay_in_the_window_and_are_exact() -> Result<()> {
    let _alone = alone();
    block_on(async {
        let path = smollm2()?;
        let eager = Engine::load(&path, &Setup::default()).await?;
        let ott = Engine::load(&path, &Setup::with("ott")).await?;
        // 159 tokens are fewer than a group and a window: nothing is quantized yet.
        for len in [1, 40, 127, 128, 140] {
            let (a, b) = (
                eager.complete(prompt(len, 3), 8).await?,
                ott.complete(prompt(len, 3), 8).await?,
            );
            assert_eq!(agreeing(&a, &b), 8, "{len} tokens: {} / {}", a.text, b.text);
        }
        Ok(())
    })
}

#[test]
fn pages_are_the_same_alone_and_in_a_batch() -> Result<()> {
    let _alone = alone();
    block_on(async {
        let path = smollm2()?;
        let lengths = [170, 300, 420];
        let mut alone = Vec::new();
        for (seed, len) in lengths.into_iter().enumerate() {
            let engine = Engine::load(&path, &Setup::with("ott")).await?;
            engine.complete(prompt(len, seed as u32), 3).await?;
            alone.extend(pages(5));
        }
        alone.sort();
        let engine = Engine::load(&path, &Setup::with("ott")).await?;
        let [a, b, c] = [0, 1, 2].map(|i| engine.complete(prompt(lengths[i], i as u32), 3));
        tokio::try_join!(a, b, c)?;
        let together = pages(5);
        assert_eq!(alone.len(), 1 + 2 + 3);
        assert!(alone == together, "pages differ between alone and batch");
        Ok(())
    })
}

/// Who hits a block finds the bytes that it would have made itself, and leaves them as they are.
#[test]
fn a_page_that_is_hit_is_the_page_recomputed() -> Result<()> {
    let _alone = alone();
    block_on(async {
        let path = smollm2()?;
        let text = prompt(420, 8);
        let engine = Engine::load(&path, &Setup::with("ott")).await?;
        engine.complete(text[..300].to_vec(), 3).await?;
        let recomputed = pages(5);
        drop(engine);
        let setup = Setup {
            prefix_cache: true,
            ..Setup::with("ott")
        };
        let engine = Engine::load(&path, &setup).await?;
        engine.complete(text[..300].to_vec(), 3).await?;
        assert_eq!(recomputed.len(), 2);
        assert!(pages(5) == recomputed, "pages depend on the prefix cache");
        let new = engine.prompt_logits(text.clone()).await?.len();
        assert_eq!(new, 420 - 256, "two blocks are hit");
        let after = pages(5);
        for page in &recomputed {
            let found = after.iter().filter(|p| *p == page).count();
            assert_eq!(found, 1, "a page that was hit is kept, once");
        }
        assert_eq!(after.len(), 3);
        Ok(())
    })
}

#[test]
fn unequal_prompts_at_once_equal_their_results_alone() -> Result<()> {
    let _alone = alone();
    block_on(async {
        let engine = Engine::load(&smollm2()?, &Setup::with("ott")).await?;
        let lengths = [9, 165, 290];
        let mut alone = Vec::new();
        for len in lengths {
            alone.push(engine.complete(prompt(len, 5), 8).await?.text);
        }
        let [a, b, c] = lengths.map(|len| engine.complete(prompt(len, 5), 8));
        let (a, b, c) = tokio::try_join!(a, b, c)?;
        assert_eq!(vec![a.text, b.text, c.text], alone);
        Ok(())
    })
}

#[test]
fn no_more_is_held_than_was_answered() -> Result<()> {
    let _alone = alone();
    block_on(async {
        let engine = Engine::load(
            &smollm2()?,
            &Setup {
                max_seqs: 1,
                ..Setup::with("ott")
            },
        )
        .await?;
        engine.complete(prompt(1000, 2), 2).await?;
        let caches = ott_backend::provider().caches();
        let cache = caches.last().expect("a model is loaded");
        assert_eq!(cache.num_layers(), 30);
        let stats = cache.stats(5).expect("there is a layer 5");
        assert_eq!(stats.sealed_blocks, 7, "{stats:?}");
        assert!(stats.traced_tokens >= 3, "{stats:?}");
        // f16 would take 30 layers x 3 heads x 128 channels x 2 bytes per token of the pool.
        let f16 = 4096 * 30 * 3 * 128 * 2;
        assert!(
            cache.bytes() * 5 < f16,
            "{} bytes against {f16}",
            cache.bytes()
        );
        Ok(())
    })
}
