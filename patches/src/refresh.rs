//! `cargo refresh`: turns edits in the host's tree back into patches, and nothing else.

use std::fs;
use std::path::Path;

use anyhow::{bail, Context, Result};

use crate::git::Git;
use crate::patch::Patch;
use crate::project::Project;
use crate::series::{self, Exported, PRISTINE};
use crate::setup::{inputs, lock, Stamp, UNFINISHED};

/// Folds uncommitted edits into the patch `name` (by default the last) and writes every patch whose diff
/// changed.
pub fn refresh(project: &Project, name: Option<&str>) -> Result<()> {
    let _lock = lock(project)?;
    let host = &project.host;
    refuse(project)?;
    let git = Git::at(host);
    let series = project.series()?;
    let last = series.last().context("patches/series lists no patch")?;
    let name = match name {
        Some(name) => series
            .iter()
            .find(|n| *n == name || series::stem(n) == name)
            .with_context(|| {
                format!("patches/series lists no {name}, but {}", series.join(", "))
            })?,
        None => last,
    };
    let edited = !git.out(&["status", "--porcelain"])?.is_empty();
    if edited {
        commit(project, &git, name)?;
    }
    fold(&git, edited)?;

    let (exported, manifests) = series::export(project, host, "HEAD")?;
    let mut written = 0;
    for patch in &exported {
        written += usize::from(write(project, &project.patch_path(&patch.name), patch)?);
    }
    written += usize::from(write_manifests(project, manifests)?);
    let missing = series
        .iter()
        .filter(|n| exported.iter().all(|e| e.name != **n));
    for name in missing {
        println!("{name}: the host has no commit of it; left alone.");
    }
    if written == 0 {
        println!("The patches say what the host holds; nothing to do.");
    }
    let head = git.line(&["rev-parse", "HEAD"])?;
    Stamp {
        inputs: inputs(project)?,
        head,
    }
    .write(host)
}

/// Refuses a tree that can't be turned into patches, and patches that are newer than the tree.
fn refuse(project: &Project) -> Result<()> {
    let host = &project.host;
    if !host.join(".git").exists() {
        bail!(
            "there is no host in {} yet: run `cargo setup` first",
            host.display()
        );
    }
    let git = Git::at(host);
    for state in [
        "rebase-merge",
        "rebase-apply",
        "MERGE_HEAD",
        "CHERRY_PICK_HEAD",
    ] {
        if host
            .join(git.line(&["rev-parse", "--git-path", state])?)
            .exists()
        {
            bail!(
                "git is in the middle of something in {} ({state}): finish or abort it first",
                host.display()
            );
        }
    }
    let Some(stamp) = Stamp::of(host) else {
        return Ok(());
    };
    if stamp.head == UNFINISHED {
        bail!("the last setup was interrupted: run `cargo setup` first");
    }
    let (exported, _) = series::export(project, host, &stamp.head)?;
    for patch in exported {
        let path = project.patch_path(&patch.name);
        if path.exists() && Patch::read(&path)?.diff != patch.diff {
            bail!(
                "{} was changed after the host was made from it, and would be overwritten. Commit your edits in {} \
                 on a branch, `cargo setup --discard`, and bring them back.",
                path.display(),
                host.display()
            );
        }
    }
    Ok(())
}

/// Commits the edits for the patch `name`.
fn commit(project: &Project, git: &Git, name: &str) -> Result<()> {
    git.out(&["add", "--all"])?;
    match series::commit_of(project, &project.host, name)? {
        Some(id) => git.out(&["commit", "--quiet", &format!("--fixup={id}")])?,
        None => git.out(&[
            "commit",
            "--quiet",
            "-m",
            &format!("{}\n\nPatch: {name}", series::stem(name)),
        ])?,
    };
    Ok(())
}

/// Brings `fixup!` commits to the ones they belong to.
fn fold(git: &Git, edited: bool) -> Result<()> {
    let subjects = git.out(&["log", "--format=%s", &format!("{PRISTINE}..HEAD")])?;
    if !subjects
        .lines()
        .any(|s| s.starts_with("fixup! ") || s.starts_with("squash! "))
    {
        return Ok(());
    }
    let rebased = git.out(&[
        "rebase",
        "--quiet",
        "--interactive",
        "--autosquash",
        PRISTINE,
    ]);
    let Err(error) = rebased else {
        return Ok(());
    };
    git.out(&["rebase", "--abort"])?;
    if edited {
        git.out(&["reset", "--quiet", "--soft", "HEAD~1"])?;
    }
    Err(error).context(
        "the edits touch lines that a later patch changes: fold them there (`cargo refresh --patch NAME`), \
         or rebase by hand and run `cargo refresh` again",
    )
}

/// Writes a patch if its diff changed; prose is kept.
fn write(project: &Project, path: &Path, new: &Exported) -> Result<bool> {
    let mut patch = if path.exists() {
        Patch::read(path)?
    } else {
        Patch::default()
    };
    if patch.diff == new.diff && !patch.header.is_empty() {
        return Ok(false);
    }
    if patch.header.is_empty() {
        let subject = new.subject.trim_start_matches("fixup! ");
        patch.header = Patch::new_header(subject, &project.version()?, &new.date);
    }
    patch.diff.clone_from(&new.diff);
    patch.update(&new.date);
    save(path, &patch)?;
    Ok(true)
}

fn write_manifests(project: &Project, diff: String) -> Result<bool> {
    let path = project.manifests_path();
    let mut patch = if path.exists() {
        Patch::read(&path)?
    } else {
        Patch::default()
    };
    if patch.diff == diff {
        return Ok(false);
    }
    patch.diff = diff;
    save(&path, &patch)?;
    Ok(true)
}

fn save(path: &Path, patch: &Patch) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, patch.text()).with_context(|| format!("writing {}", path.display()))?;
    println!("Wrote {}.", path.display());
    Ok(())
}
