//! `cargo demo`, `cargo bench-kv`, `cargo eval-kv`, `cargo soak`: from nothing to a program with the patched host in it,
//! and what it says.

use std::process::Command;

use anyhow::Result;

use crate::freshness;
use crate::models;
use crate::project::Project;
use crate::setup::setup;
use crate::tasks::{cargo_host_build, host_target, run};

/// Programs of integration-tests, each with the model that it runs if the user names none.
const PROGRAMS: [(&str, &str); 4] = [
    // A person reads its answers.
    ("demo", "qwen2.5-coder-0.5b"),
    ("bench-kv", "smollm2-135m"),
    ("eval-kv", "smollm2-135m"),
    ("soak", "smollm2-135m"),
];

/// Whether `task` is the name of a program.
pub fn is_program(task: &str) -> bool {
    PROGRAMS.iter().any(|(name, _)| *name == task)
}

/// Sets up, builds, fetches the program's model unless `args` name one, and runs it with `args`.
pub fn program(project: &Project, task: &str, args: &[String]) -> Result<()> {
    setup(project, false)?;
    let named = args.iter().any(|a| a == "-m" || a.starts_with("--model"));
    let help = args.iter().any(|a| a == "-h" || a == "--help");
    let model = PROGRAMS.iter().find(|(name, _)| *name == task);
    let model = match model {
        Some((_, model)) if !named && !help => Some(models::ensure(model)?),
        _ => None,
    };
    freshness::restore(project)?;
    eprintln!("Building the host; the first time takes a while (about 20 minutes on 2 cores).");
    run("the build of the host", cargo_host_build(project)?)?;
    let name = format!("{task}{}", std::env::consts::EXE_SUFFIX);
    let mut program = Command::new(host_target()?.join("release").join(name));
    if let Some(model) = model {
        program.arg("-m").arg(model);
    }
    program.args(args);
    run(task, program)
}
