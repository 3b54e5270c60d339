//! The host's history: one commit of what was published, one for its manifests, one for each patch.
//!
//! `apply` goes from patch files to commits, `export` from commits to patch files. Each is the other's inverse.

use std::path::Path;

use anyhow::{bail, Context, Result};

use crate::git::{Git, SETUP_DATE};
use crate::patch::{quiet, Patch};
use crate::project::Project;
use crate::registry;

/// The tag on the published crates.
pub const PRISTINE: &str = "pristine";
const MANIFESTS: &str = ":(glob)*/Cargo.toml";
const NOT_MANIFESTS: &str = ":(exclude,glob)*/Cargo.toml";
/// What editors, cargo and rejected hunks leave behind; never part of a patch.
const EXCLUDES: &str = "target/\n*.rej\n*~\n.*.sw?\n.DS_Store\n";

/// Materialises the patched host in `dir`, which must not exist. Returns its commit.
pub fn apply(project: &Project, dir: &Path) -> Result<String> {
    std::fs::create_dir_all(dir)?;
    registry::unpack(project, &project.patched()?, dir)?;
    let git = Git::dated(dir, SETUP_DATE);
    git.out(&["init", "--quiet", "--initial-branch=main"])?;
    std::fs::write(dir.join(".git/info/exclude"), EXCLUDES)?;
    git.out(&["add", "--all", "--force"])?;
    git.out(&["commit", "--quiet", "-m", "mistral.rs, as published"])?;
    git.out(&["tag", PRISTINE])?;

    let manifests = project.manifests_path();
    if manifests.exists() {
        apply_one(&git, &manifests, "Manifests, as published")?;
    }
    for name in project.series()? {
        let path = project.patch_path(&name);
        let subject = match Patch::read(&path)?.field("Subject") {
            "" => stem(&name).to_string(),
            subject => subject.to_string(),
        };
        apply_one(&git, &path, &format!("{subject}\n\nPatch: {name}"))?;
    }
    git.line(&["rev-parse", "HEAD"])
}

fn apply_one(git: &Git, path: &Path, message: &str) -> Result<()> {
    let patch = Patch::read(path)?;
    // git applies a hunk where its context stands word for word, or not at all.
    if !patch.diff.is_empty() {
        git.pipe(&["apply", "--index", "--whitespace=nowarn"], &patch.diff)
            .with_context(|| format!("{} does not apply", path.display()))?;
    }
    git.out(&["commit", "--quiet", "--allow-empty", "-m", message])?;
    Ok(())
}

/// A patch's commits in a host's history, and the diff they make.
#[derive(Debug)]
pub struct Exported {
    /// The patch's file name.
    pub name: String,
    /// The subject of the first commit.
    pub subject: String,
    /// The day of the last commit.
    pub date: String,
    pub diff: String,
}

/// One commit above `pristine`.
struct Commit {
    id: String,
    subject: String,
    date: String,
    /// The patch it belongs to; none for one that touches manifests only.
    patch: Option<String>,
}

/// The series' diffs as the history of `host` up to `tip` has them, and that of its manifests.
///
/// A commit belongs to the patch named by its `Patch:` trailer, else to the one whose Subject or file stem
/// its own subject starts with, else to the patch of the commit before it. A patch's commits stand together, in
/// the order of the series.
pub fn export(project: &Project, host: &Path, tip: &str) -> Result<(Vec<Exported>, String)> {
    let git = Git::at(host);
    let series = project.series()?;
    let mut exported: Vec<Exported> = Vec::new();
    let mut base = PRISTINE.to_string();
    for commit in commits(project, &git, &series, tip)? {
        let diff = |from: &str| rendered(&git, from, &commit.id, NOT_MANIFESTS);
        match (&commit.patch, exported.last_mut()) {
            // Manifests only: no diff below shows it.
            (None, _) => {}
            (Some(name), Some(last)) if *name == last.name => {
                last.diff = diff(&base)?;
                last.date = commit.date;
            }
            (Some(name), last) => {
                if let Some(last) = last {
                    check_order(&series, &last.name, name, &commit.subject)?;
                    base = git.line(&["rev-parse", &format!("{}^", commit.id)])?;
                }
                exported.push(Exported {
                    name: name.clone(),
                    subject: commit.subject.clone(),
                    date: commit.date.clone(),
                    diff: diff(&base)?,
                });
            }
        }
    }
    let manifests = rendered(&git, PRISTINE, tip, MANIFESTS)?;
    Ok((exported, manifests))
}

/// The newest commit of each patch, for `git commit --fixup`.
pub fn commit_of(project: &Project, host: &Path, name: &str) -> Result<Option<String>> {
    let all = commits(project, &Git::at(host), &project.series()?, "HEAD")?;
    let newest = all
        .into_iter()
        .rev()
        .find(|c| c.patch.as_deref() == Some(name));
    Ok(newest.map(|c| c.id))
}

fn commits(project: &Project, git: &Git, series: &[String], tip: &str) -> Result<Vec<Commit>> {
    let range = format!("{PRISTINE}..{tip}");
    if !git.ok(&["merge-base", "--is-ancestor", PRISTINE, tip]) {
        bail!("the host's history does not start at its tag `{PRISTINE}`: `cargo setup --discard` makes it anew");
    }
    if !git.out(&["rev-list", "--merges", &range])?.is_empty() {
        bail!("the host's history holds a merge, which is no series of patches: rebase it");
    }
    let subjects: Vec<(String, String)> = series
        .iter()
        .map(|name| {
            let patch = Patch::read(&project.patch_path(name)).unwrap_or_default();
            (name.clone(), patch.field("Subject").to_string())
        })
        .collect();
    let format = "--format=%H%x1f%cs%x1f%s%x1f%(trailers:key=Patch,valueonly,separator=%x2C)";
    let log = git.out(&["log", "--reverse", format, &range])?;
    let mut commits = Vec::new();
    let mut last: Option<String> = None;
    for line in log.lines() {
        let mut fields = line.split('\x1f').map(str::to_string);
        let mut next = || fields.next().unwrap_or_default();
        let (id, date, subject, trailer) = (next(), next(), next(), next());
        let manifests_only = rendered(git, &format!("{id}^"), &id, NOT_MANIFESTS)?.is_empty();
        let patch = match owner(&subjects, &subject, &trailer) {
            Some(name) => Some(name),
            None if manifests_only => None,
            None => last.clone(),
        };
        if patch.is_none() && !manifests_only {
            bail!(
                "the commit `{subject}` belongs to no patch: start its subject with one of {} or add the \
                 line `Patch: NAME.patch` to its message",
                series.iter().map(|n| stem(n)).collect::<Vec<_>>().join(", ")
            );
        }
        last = patch.clone().or(last);
        commits.push(Commit {
            id,
            subject,
            date,
            patch,
        });
    }
    Ok(commits)
}

fn owner(subjects: &[(String, String)], subject: &str, trailer: &str) -> Option<String> {
    let trailer = trailer.split(',').next().unwrap_or_default().trim();
    let subject = subject.trim_start_matches("fixup! ");
    let mut names = subjects.iter();
    let found = if trailer.is_empty() {
        names.find(|(name, s)| (!s.is_empty() && subject == s) || subject.starts_with(stem(name)))
    } else {
        names.find(|(name, _)| name == trailer)
    };
    found.map(|(name, _)| name.clone())
}

fn check_order(series: &[String], before: &str, after: &str, subject: &str) -> Result<()> {
    let at = |name: &str| series.iter().position(|n| n == name);
    if at(before) < at(after) {
        return Ok(());
    }
    bail!(
        "the commit `{subject}` of {after} stands after those of {before}, against the order of patches/series: \
         reorder the host's commits (`git rebase -i {PRISTINE}`)"
    )
}

/// A diff that is a function of the two trees alone.
fn rendered(git: &Git, from: &str, to: &str, paths: &str) -> Result<String> {
    let diff = git.out(&[
        "diff",
        "--no-color",
        "--no-ext-diff",
        "--no-renames",
        "--unified=3",
        "--diff-algorithm=histogram",
        "--src-prefix=a/",
        "--dst-prefix=b/",
        from,
        to,
        "--",
        paths,
    ])?;
    if let Some(line) = diff.lines().find(|l| l.starts_with("Binary files ")) {
        bail!("a patch holds text only, but: {line}");
    }
    Ok(quiet(&diff))
}

/// A patch's file name without `.patch`.
pub fn stem(name: &str) -> &str {
    name.strip_suffix(".patch").unwrap_or(name)
}
