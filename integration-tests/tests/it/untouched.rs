//! With no backend chosen, the patched host answers as the published one: bit for bit.

use std::process::Command;

use anyhow::{ensure, Result};
use integration_tests::engine::{Engine, Setup};
use integration_tests::model::smollm2;
use integration_tests::request::transcript;
use integration_tests::server::program;

use crate::{alone, block_on};

#[test]
fn without_a_backend_the_host_is_the_published_one() -> Result<()> {
    let _alone = alone();
    let path = smollm2()?;
    let published = Command::new(program("pristine")?).arg(&path).output()?;
    ensure!(
        published.status.success(),
        "{}",
        String::from_utf8_lossy(&published.stderr)
    );
    let published = String::from_utf8(published.stdout)?;
    let patched = block_on(async {
        let engine = Engine::load(&path, &Setup::default()).await?;
        transcript(engine.runner()).await
    })?;
    assert_eq!(patched, published);
    Ok(())
}
