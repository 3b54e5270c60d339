//! `cargo demo`: from nothing to an answer with `--kv-cache ott` beside one without.

use std::process::Command;

use anyhow::Result;

use crate::freshness;
use crate::models;
use crate::project::Project;
use crate::setup::setup;
use crate::tasks::{cargo_host_build, host_target, run};

/// The model a person's first answer comes from.
const MODEL: &str = "qwen2.5-coder-0.5b";

/// Sets up, builds, fetches the model unless `args` name one, and runs the demo with `args`.
pub fn demo(project: &Project, args: &[String]) -> Result<()> {
    setup(project, false)?;
    let named = args.iter().any(|a| a == "-m" || a.starts_with("--model"));
    let help = args.iter().any(|a| a == "-h" || a == "--help");
    let model = if named || help {
        None
    } else {
        Some(models::ensure(MODEL)?)
    };
    freshness::restore(project)?;
    eprintln!("Building the host; the first time takes a while (about 20 minutes on 2 cores).");
    run("the build of the host", cargo_host_build(project)?)?;
    let name = format!("demo{}", std::env::consts::EXE_SUFFIX);
    let mut demo = Command::new(host_target()?.join("release").join(name));
    if let Some(model) = model {
        demo.arg("-m").arg(model);
    }
    demo.args(args);
    run("the demo", demo)
}
