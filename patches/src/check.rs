//! `ott-patches check`: do the series, the headers and the tree agree, and are the patches what they promise
//! to be: neutral, small, away from the models?

use std::fs;

use anyhow::{bail, Result};

use crate::git::Git;
use crate::patch::{Change, Patch, FIELDS};
use crate::project::Project;
use crate::registry::remove_dir;
use crate::series::{self, PRISTINE};

/// Lines added to files that upstream has. New files are free: a call site is what hurts at the next update.
/// 48 of them count hits, evictions and preemptions where the host knows them, and keep the error of one sequence from
/// the others of its batch. The last 265 mend what a new user meets in the first hour: how answers end and are streamed,
/// and which prompts wait; 24 of them only moved. 154 refuse settings and sizes, say which cache is in use, size a pool on
/// one of several GPUs and rotate rows by their own length. 20 end a step and tell whose fault it is. 117 take what a decode
/// step did once per row, and did not need to; they remove 135.
const ADDED_BUDGET: usize = 1283;
/// Files of upstream's that are changed.
const FILES_BUDGET: usize = 58;
/// The one place in the host that may say our name: where the command line registers our backend.
const REGISTRATION: &str = "mistralrs-cli/src/";
const REGISTRATION_LINES: usize = 3;

/// Runs every check; prints the diffstat; fails with all that is wrong.
pub fn check(project: &Project) -> Result<()> {
    let mut wrong = Vec::new();
    let mut changes = Vec::new();
    for name in project.series()? {
        let path = project.patch_path(&name);
        match Patch::read(&path) {
            Ok(patch) => {
                wrong.extend(header(&name, &patch));
                changes.extend(patch.changes());
            }
            Err(_) => wrong.push(format!(
                "patches/series lists {name}, but there is no such file"
            )),
        }
    }
    wrong.extend(unlisted(project)?);
    wrong.extend(promises(&changes));
    if wrong.is_empty() {
        wrong.extend(tree(project)?);
    }
    if wrong.is_empty() {
        println!("The patches are in order.");
        return Ok(());
    }
    bail!(
        "the patches are not in order:\n  - {}",
        wrong.join("\n  - ")
    )
}

/// A header tells what, for which version, upstream's stand, why, since when, and how to test it.
fn header(name: &str, patch: &Patch) -> Vec<String> {
    let mut wrong = Vec::new();
    for field in FIELDS {
        if patch.field(field).is_empty() {
            wrong.push(format!("{name}: its header has no `{field}:`"));
        }
    }
    if patch.prose().is_empty() {
        wrong.push(format!("{name}: its header does not say why it exists"));
    }
    if patch.diff.is_empty() {
        wrong.push(format!("{name}: it changes nothing"));
    }
    wrong
}

fn unlisted(project: &Project) -> Result<Vec<String>> {
    let series = project.series()?;
    let mut wrong = Vec::new();
    for entry in fs::read_dir(&project.patches)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".patch") && !series.contains(&name) {
            wrong.push(format!("{name} is not listed in patches/series"));
        }
    }
    Ok(wrong)
}

/// What the patches promise about the host.
fn promises(changes: &[Change]) -> Vec<String> {
    let mut wrong = Vec::new();
    for change in changes {
        let in_models = change
            .path
            .split('/')
            .any(|dir| dir == "models" || dir == "vision_models");
        if in_models {
            wrong.push(format!("{}: the patches touch no model", change.path));
        }
    }
    let names: Vec<_> = changes
        .iter()
        .flat_map(|c| c.added.iter().map(move |line| (&c.path, line)))
        .filter(|(_, line)| says_ott(line))
        .collect();
    let (registration, others): (Vec<_>, Vec<_>) = names
        .into_iter()
        .partition(|(path, _)| path.starts_with(REGISTRATION));
    for (path, line) in others {
        wrong.push(format!(
            "{path}: the host is neutral and does not say `ott`: {}",
            line.trim()
        ));
    }
    if registration.len() > REGISTRATION_LINES {
        wrong.push(format!(
            "{REGISTRATION}: {} lines say `ott`; registering a backend takes {REGISTRATION_LINES} at most",
            registration.len()
        ));
    }
    wrong.extend(size(changes));
    wrong
}

/// Prints the diffstat and holds it against the budgets.
fn size(changes: &[Change]) -> Vec<String> {
    let sum = |new: bool| {
        let of_kind = || {
            changes
                .iter()
                .filter(move |c| is_new(changes, &c.path) == new)
        };
        let mut paths: Vec<_> = of_kind().map(|c| &c.path).collect();
        paths.sort();
        paths.dedup();
        let added: usize = of_kind().map(|c| c.added.len()).sum();
        let removed: usize = of_kind().map(|c| c.removed).sum();
        (paths.len(), added, removed)
    };
    let (files, added, removed) = sum(false);
    let (new_files, new_lines, _) = sum(true);
    println!(
        "Existing files: {files} (of {FILES_BUDGET}), +{added} (of {ADDED_BUDGET}) -{removed} lines. \
         New files: {new_files}, {new_lines} lines."
    );
    let mut wrong = Vec::new();
    if files > FILES_BUDGET {
        wrong.push(format!(
            "{files} files of upstream's are changed, the budget is {FILES_BUDGET}"
        ));
    }
    if added > ADDED_BUDGET {
        wrong.push(format!(
            "{added} lines are added to upstream's files, the budget is {ADDED_BUDGET}"
        ));
    }
    wrong
}

/// Whether some patch of the series makes the file.
fn is_new(changes: &[Change], path: &str) -> bool {
    changes.iter().any(|c| c.is_new && c.path == path)
}

/// Whether a line says our name as a word: `ott`, `OTT`, `ott_backend`.
fn says_ott(line: &str) -> bool {
    line.split(|c: char| !c.is_ascii_alphanumeric())
        .any(|word| word.eq_ignore_ascii_case("ott"))
}

/// Published crates + series = tree, and tree = series.
fn tree(project: &Project) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let fresh = project.beside_host("check");
    remove_dir(&fresh)?;
    series::apply(project, &fresh)?;
    let (exported, manifests) = series::export(project, &fresh, "HEAD")?;
    for patch in exported {
        if Patch::read(&project.patch_path(&patch.name))?.diff != patch.diff {
            wrong.push(format!(
                "{}: `cargo refresh` would write another diff (shifted lines, or edited by hand)",
                patch.name
            ));
        }
    }
    let path = project.manifests_path();
    let held = if path.exists() {
        Patch::read(&path)?.diff
    } else {
        String::new()
    };
    if held != manifests {
        wrong.push(
            "manifests/registry.patch: it and the manifests in the patches disagree".to_string(),
        );
    }
    wrong.extend(host(project, &Git::at(&fresh))?);
    remove_dir(&fresh)?;
    Ok(wrong)
}

/// The host, where it was made, holds what the patches say.
fn host(project: &Project, fresh: &Git) -> Result<Vec<String>> {
    if !project.host.exists() {
        return Ok(Vec::new());
    }
    let host = Git::at(&project.host);
    let mut wrong = Vec::new();
    if !host.out(&["status", "--porcelain"])?.is_empty() {
        wrong.push("the host holds edits that are in no patch: run `cargo refresh`".to_string());
    }
    for (rev, what) in [
        (PRISTINE, "the published crates"),
        ("HEAD", "the published crates and the series"),
    ] {
        let tree = format!("{rev}^{{tree}}");
        if host.line(&["rev-parse", &tree]).ok() != Some(fresh.line(&["rev-parse", &tree])?) {
            wrong.push(format!(
                "the host's `{rev}` is not {what}: run `cargo setup` or `cargo refresh`"
            ));
        }
    }
    Ok(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_name_is_found_as_a_word_only() {
        assert!(says_ott("    ott_backend::register();"));
        assert!(says_ott("/// `--kv-cache OTT`"));
        assert!(!says_ott("bottom, ottoman, lotto"));
    }
}
