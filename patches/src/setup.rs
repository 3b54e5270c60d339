//! `cargo setup`: makes the tree what `patches/` says, or says why it won't.
//!
//! The stamp is written last and lives in the tree's git directory. It names what the tree was made from and
//! the commit that came out; while we change the tree it says so, and an interruption is seen by the next run.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{bail, Context, Result};
use sha2::{Digest, Sha256};

use crate::git::Git;
use crate::patch::Patch;
use crate::project::Project;
use crate::registry::{hex, remove_dir, unpack};
use crate::series::{self, PRISTINE};

/// Raise it when this tool makes another tree of the same patches.
const FORMAT: &str = "1";
/// In the place of a commit, while the tree is being changed.
pub const UNFINISHED: &str = "unfinished";

/// What a tree was made from, and what came out.
#[derive(Clone, Debug, PartialEq)]
pub struct Stamp {
    /// Hash over `upstream.toml`, the series and every diff.
    pub inputs: String,
    /// The tree's commit, or `unfinished`.
    pub head: String,
}

impl Stamp {
    /// The stamp of the tree at `host`, if it has one.
    pub fn of(host: &Path) -> Option<Self> {
        let text = fs::read_to_string(Self::path(host).ok()?).ok()?;
        let (inputs, head) = text.trim().split_once(' ')?;
        Some(Self {
            inputs: inputs.to_string(),
            head: head.to_string(),
        })
    }

    /// Writes it into the tree at `host`.
    pub fn write(&self, host: &Path) -> Result<()> {
        let path = Self::path(host)?;
        fs::write(&path, format!("{} {}\n", self.inputs, self.head))
            .with_context(|| format!("writing {}", path.display()))
    }

    fn path(host: &Path) -> Result<PathBuf> {
        if !host.join(".git").exists() {
            bail!("{} is no git repository", host.display());
        }
        Ok(host.join(Git::at(host).line(&["rev-parse", "--git-path", "ott-setup"])?))
    }
}

/// Hash of all that decides what the tree holds. Prose above a diff does not.
pub fn inputs(project: &Project) -> Result<String> {
    let mut hash = Sha256::new();
    let mut add = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    add(FORMAT);
    for upstream in project.patched()? {
        add(&upstream.stem());
        add(&upstream.sha256);
    }
    let manifests = project.manifests_path();
    if manifests.exists() {
        add(&Patch::read(&manifests)?.diff);
    }
    for name in project.series()? {
        let path = project.patch_path(&name);
        if !path.exists() {
            bail!(
                "patches/series lists {name}, but there is no {}",
                path.display()
            );
        }
        let patch = Patch::read(&path)?;
        add(&name);
        add(patch.field("Subject"));
        add(&patch.diff);
    }
    Ok(hex(&hash.finalize()))
}

/// What stands where the host should.
enum Found {
    /// Nothing.
    Nothing,
    /// The very tree that is asked for.
    Ready,
    /// A tree of ours that holds no edits, or whose edits may go: from other patches, or half done.
    Ours,
}

/// Makes the tree, unless it stands. `discard` throws edits away.
pub fn setup(project: &Project, discard: bool) -> Result<()> {
    let start = Instant::now();
    let inputs = inputs(project)?;
    let _lock = lock(project)?;
    let host = project.host.display();
    let found = if discard {
        discarded(project)
    } else {
        look(project, &inputs)?
    };
    if matches!(found, Found::Ready) {
        println!("The patched host stands in {host}; nothing to do.");
        return Ok(());
    }
    let staging = project.beside_host("staging");
    remove_dir(&staging)?;
    let head = series::apply(project, &staging)?;
    let stamp = Stamp { inputs, head };
    let ours = matches!(found, Found::Ours);
    let done = match ours.then(|| update(project, &staging, &stamp)) {
        Some(Ok(())) => "brought up to date",
        Some(Err(error)) if !discard => {
            let way_out = format!("{host} is damaged; `cargo setup --discard` makes it anew");
            return Err(error.context(way_out));
        }
        _ => {
            replace(project, &staging, &stamp)?;
            "made"
        }
    };
    remove_dir(&staging)?;
    println!(
        "The patched host was {done} in {host} ({} patches, {:.1} s).",
        project.series()?.len(),
        start.elapsed().as_secs_f32()
    );
    Ok(())
}

fn discarded(project: &Project) -> Found {
    if project.host.join(".git").exists() {
        Found::Ours
    } else {
        Found::Nothing
    }
}

/// `cargo setup --unpatched DIR`: the crates as published, for upstream's own tests.
pub fn unpatched(project: &Project, dir: &Path) -> Result<()> {
    if dir.exists() {
        bail!(
            "{} is there already: name a folder that is not",
            dir.display()
        );
    }
    fs::create_dir_all(dir)?;
    let crates = [project.patched()?, project.unpatched()?].concat();
    unpack(project, &crates, dir)?;
    println!(
        "{} crates as published are in {}.",
        crates.len(),
        dir.display()
    );
    Ok(())
}

fn look(project: &Project, inputs: &str) -> Result<Found> {
    let host = &project.host;
    if !host.join(".git").exists() {
        let empty = fs::read_dir(host).map_or(true, |mut entries| entries.next().is_none());
        if !empty {
            bail!(
                "{} holds files that `cargo setup` did not make: move them, or run `cargo setup --discard` \
                 to throw them away",
                host.display()
            );
        }
        return Ok(Found::Nothing);
    }
    let git = Git::at(host);
    let stamp = match Stamp::of(host) {
        Some(stamp) if stamp.head == UNFINISHED => {
            println!("The last setup was interrupted; finishing it.");
            return Ok(Found::Ours);
        }
        Some(stamp) => stamp,
        // Never stamped: only what was published is surely nobody's work.
        None => Stamp {
            inputs: String::new(),
            head: git
                .line(&["rev-parse", "--verify", "--quiet", PRISTINE])
                .unwrap_or_default(),
        },
    };
    refuse_edits(project, &git, &stamp)?;
    Ok(if stamp.inputs == inputs {
        Found::Ready
    } else {
        Found::Ours
    })
}

fn refuse_edits(project: &Project, git: &Git, stamp: &Stamp) -> Result<()> {
    let edits = git.out(&["status", "--porcelain"]).with_context(|| {
        format!(
            "{} is damaged; `cargo setup --discard` makes it anew",
            project.host.display()
        )
    })?;
    // Other branches are safe: nothing here touches them.
    let known = format!("^{}", stamp.head);
    let commits = git
        .out(&["log", "--format=%h %s", "HEAD", &known])
        .unwrap_or_else(|_| "a history without the published crates".to_string());
    let moved = git.line(&["rev-parse", "HEAD"]).ok().as_deref() != Some(&stamp.head);
    if edits.is_empty() && commits.is_empty() && !moved {
        return Ok(());
    }
    let found: Vec<_> = edits.lines().chain(commits.lines()).take(8).collect();
    bail!(
        "{} holds work that is in no patch:\n  {}\nKeep it with `cargo refresh`, which writes it into patches/, \
         or throw it away with `cargo setup --discard`.",
        project.host.display(),
        found.join("\n  ")
    )
}

/// Takes over the staged history; git rewrites the files that differ and leaves the others' times alone, so
/// that cargo rebuilds what changed.
fn update(project: &Project, staging: &Path, stamp: &Stamp) -> Result<()> {
    let host = &project.host;
    let git = Git::at(host);
    let unfinished = Stamp {
        head: UNFINISHED.to_string(),
        ..stamp.clone()
    };
    unfinished.write(host)?;
    let _ = fs::remove_file(host.join(git.line(&["rev-parse", "--git-path", "index.lock"])?));
    let _ = git.out(&["rebase", "--quit"]);
    let from = staging.to_string_lossy();
    git.out(&[
        "fetch",
        "--quiet",
        "--force",
        &from,
        "refs/tags/*:refs/tags/*",
        "HEAD",
    ])?;
    git.out(&["reset", "--quiet", "--hard", &stamp.head])?;
    git.out(&["clean", "--quiet", "--force", "-d"])?;
    stamp.write(host)
}

/// Puts the staged tree, stamped, in the place of whatever is there.
fn replace(project: &Project, staging: &Path, stamp: &Stamp) -> Result<()> {
    let host = &project.host;
    stamp.write(staging)?;
    let old = project.beside_host("old");
    remove_dir(&old)?;
    if host.exists() {
        fs::rename(host, &old).with_context(|| format!("moving {} away", host.display()))?;
    }
    fs::rename(staging, host).with_context(|| format!("moving the host to {}", host.display()))?;
    remove_dir(&old)
}

/// One setup at a time; the lock goes with the process.
pub fn lock(project: &Project) -> Result<File> {
    if let Some(parent) = project.host.parent() {
        fs::create_dir_all(parent)?;
    }
    let path = project.beside_host("lock");
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    if file.try_lock().is_err() {
        println!("Waiting for another setup of this checkout to end.");
        file.lock()?;
    }
    Ok(file)
}
