//! The tool on a host of one tiny crate: everything but the registry.

mod checkout;
mod documents;

use std::fs;

use crate::git::Git;
use crate::patch::Patch;
use crate::registry::in_cache;
use crate::setup::{setup, Stamp, UNFINISHED};

use self::checkout::{Checkout, LIB, OTHER};

fn says<T>(result: anyhow::Result<T>, what: &str) {
    let Err(error) = result else {
        panic!("should have failed, saying: {what}");
    };
    let error = format!("{error:#}");
    assert!(error.contains(what), "`{error}` does not say `{what}`");
}

#[test]
fn setup_applies_the_series_and_is_idempotent() {
    let checkout = Checkout::new();
    checkout.setup().unwrap();
    assert!(checkout.host(LIB).starts_with("first line\n"));
    assert!(checkout.host(LIB).ends_with("second line\n"));
    let head = Stamp::of(&checkout.project.host);
    let before = checkout.modified(LIB);
    checkout.setup().unwrap();
    assert_eq!(Stamp::of(&checkout.project.host), head);
    assert_eq!(checkout.modified(LIB), before);
    checkout.check().unwrap();
}

#[test]
fn two_setups_give_the_same_commit() {
    let (one, two) = (Checkout::new(), Checkout::new());
    one.setup().unwrap();
    two.setup().unwrap();
    assert_eq!(Stamp::of(&one.project.host), Stamp::of(&two.project.host));
}

#[test]
fn a_changed_patch_touches_only_its_files() {
    let checkout = Checkout::new();
    checkout.setup().unwrap();
    let (lib, other) = (checkout.modified(LIB), checkout.modified(OTHER));
    checkout.write_patch("second", 17, "line 20", "another second line");
    checkout.setup().unwrap();
    assert!(checkout.host(LIB).ends_with("another second line\n"));
    assert!(checkout.modified(LIB) > lib);
    assert_eq!(checkout.modified(OTHER), other);
}

#[test]
fn an_archive_of_another_hash_is_not_taken() {
    let checkout = Checkout::new();
    let tiny = &checkout.project.patched().unwrap()[0];
    assert!(in_cache(&checkout.project, tiny).is_some());
    let cache = checkout.project.cargo_home.join("registry/cache/index");
    fs::write(cache.join("tiny-0.1.0.crate"), "something else").unwrap();
    assert!(in_cache(&checkout.project, tiny).is_none());
}

#[test]
fn a_patch_that_does_not_apply_leaves_no_host() {
    let checkout = Checkout::new();
    checkout.write_patch("second", 17, "line twenty", "second line");
    says(checkout.setup(), "second.patch does not apply");
    assert!(!checkout.project.host.exists());
    checkout.write_patch("second", 17, "line 20", "second line");
    checkout.setup().unwrap();
}

#[test]
fn an_interrupted_setup_is_repaired() {
    let checkout = Checkout::new();
    checkout.setup().unwrap();
    let host = &checkout.project.host;
    let done = Stamp::of(host).unwrap();
    let unfinished = Stamp {
        head: UNFINISHED.to_string(),
        ..done.clone()
    };
    unfinished.write(host).unwrap();
    fs::write(host.join(LIB), "half").unwrap();
    fs::write(host.join(".git/index.lock"), "").unwrap();
    fs::create_dir_all(checkout.project.beside_host("staging")).unwrap();
    checkout.setup().unwrap();
    assert_eq!(Stamp::of(host), Some(done));
    checkout.check().unwrap();
}

#[test]
fn edits_are_never_lost_without_being_told() {
    let checkout = Checkout::new();
    checkout.setup().unwrap();
    checkout.edit("line 10", "edited");
    says(checkout.setup(), "cargo refresh");
    let git = Git::at(&checkout.project.host);
    git.out(&["commit", "--quiet", "-am", "second: more"])
        .unwrap();
    says(checkout.setup(), "second: more");
    setup(&checkout.project, true).unwrap();
    assert!(checkout.host(LIB).contains("line 10"));
    checkout.setup().unwrap();
}

#[test]
fn other_branches_are_left_alone() {
    let checkout = Checkout::new();
    checkout.setup().unwrap();
    let git = Git::at(&checkout.project.host);
    git.out(&["branch", "mine"]).unwrap();
    checkout.write_patch("second", 17, "line 20", "another second line");
    checkout.setup().unwrap();
    checkout.setup().unwrap();
    setup(&checkout.project, true).unwrap();
    assert!(git.ok(&["rev-parse", "--verify", "mine"]));
}

#[test]
fn a_damaged_tree_is_made_anew_when_told() {
    let checkout = Checkout::new();
    checkout.setup().unwrap();
    // git must not take the checkout's repository around the host for the host's.
    let around = Git::at(&checkout.project.root);
    around.out(&["init", "--quiet"]).unwrap();
    around
        .out(&["commit", "--quiet", "--allow-empty", "-m", "around"])
        .unwrap();
    let head = around.line(&["rev-parse", "HEAD"]).unwrap();
    fs::write(checkout.project.root.join("precious"), "").unwrap();

    fs::write(checkout.project.host.join(".git/HEAD"), "nonsense").unwrap();
    says(checkout.setup(), "--discard");
    setup(&checkout.project, true).unwrap();
    assert_eq!(around.line(&["rev-parse", "HEAD"]).unwrap(), head);
    assert!(checkout.project.root.join("precious").exists());
    checkout.setup().unwrap();
    checkout.check().unwrap();
}

#[test]
fn a_tree_of_unknown_origin_is_refused() {
    let checkout = Checkout::new();
    fs::create_dir_all(checkout.project.host.join("tiny")).unwrap();
    says(checkout.setup(), "--discard");
    setup(&checkout.project, true).unwrap();
    let git = checkout.project.host.join(".git/ott-setup");
    fs::remove_file(git).unwrap();
    says(checkout.setup(), "--discard");
}

#[test]
fn refresh_of_nothing_changes_nothing() {
    let checkout = Checkout::new();
    checkout.setup().unwrap();
    let before = (checkout.patch("first"), checkout.patch("second"));
    checkout.refresh(None).unwrap();
    assert_eq!((checkout.patch("first"), checkout.patch("second")), before);
    checkout.setup().unwrap();
}

#[test]
fn edits_go_into_the_last_patch_or_the_named_one() {
    let checkout = Checkout::new();
    checkout.setup().unwrap();
    let first = checkout.patch("first");
    checkout.edit("line 18", "edited 18");
    checkout.refresh(None).unwrap();
    assert_eq!(checkout.patch("first"), first);
    assert!(checkout.patch("second").contains("+edited 18"));
    assert!(checkout.patch("second").contains("Prose stays."));
    assert!(!checkout.patch("second").contains("2020-01-01"));

    let second = Patch::parse(&checkout.patch("second"));
    checkout.edit("line 2\n", "edited 2\n");
    checkout.refresh(Some("first")).unwrap();
    assert!(checkout.patch("first").contains("+edited 2"));
    assert_eq!(Patch::parse(&checkout.patch("second")), second);
    checkout.check().unwrap();
    checkout.setup().unwrap();
    setup(&checkout.project, true).unwrap();
    assert!(checkout.host(LIB).contains("edited 2\n"));
}

#[test]
fn edits_in_a_later_patchs_lines_are_refused_and_kept() {
    let checkout = Checkout::new();
    checkout.setup().unwrap();
    let first = checkout.patch("first");
    checkout.edit("second line", "second line, edited");
    says(checkout.refresh(Some("first")), "later patch");
    assert!(checkout.host(LIB).contains("second line, edited"));
    assert_eq!(checkout.patch("first"), first);
    checkout.refresh(Some("second")).unwrap();
    checkout.check().unwrap();
}

#[test]
fn patches_newer_than_the_host_are_not_overwritten() {
    let checkout = Checkout::new();
    checkout.setup().unwrap();
    checkout.write_patch("second", 17, "line 20", "pulled");
    says(checkout.refresh(None), "would be overwritten");
    assert!(checkout.patch("second").contains("+pulled"));
}

#[test]
fn commits_on_a_branch_become_patches_and_manifests_apart() {
    let checkout = Checkout::new();
    checkout.setup().unwrap();
    fs::remove_file(checkout.patch_path("first")).unwrap();
    fs::remove_file(checkout.patch_path("second")).unwrap();
    let git = Git::at(&checkout.project.host);
    git.out(&["reset", "--quiet", "--hard", "pristine"])
        .unwrap();
    for (message, old, new) in [
        ("first: begin", "line 1\n", "begun\n"),
        ("and its end", "line 3\n", "ended\n"),
        ("second", "line 20\n", "twenty\n"),
    ] {
        checkout.edit(old, new);
        let manifest = checkout.project.host.join("tiny/Cargo.toml");
        let text = fs::read_to_string(&manifest).unwrap();
        fs::write(&manifest, format!("{text}# {message}\n")).unwrap();
        git.out(&["commit", "--quiet", "-m", "needs", "tiny/Cargo.toml"])
            .unwrap();
        git.out(&["commit", "--quiet", "-am", message]).unwrap();
    }
    checkout.refresh(None).unwrap();
    let (first, second) = (checkout.patch("first"), checkout.patch("second"));
    assert!(first.contains("+begun") && first.contains("+ended") && !first.contains("Cargo.toml"));
    assert!(first.starts_with("Subject: first: begin\n"));
    assert!(second.contains("+twenty") && !second.contains("index "));
    let manifests = Patch::read(&checkout.project.manifests_path()).unwrap();
    assert_eq!(manifests.changes()[0].added.len(), 3);
    setup(&checkout.project, true).unwrap();
    assert!(checkout.host("tiny/Cargo.toml").ends_with("# second\n"));
    assert!(checkout.host(LIB).starts_with("begun\n"));
    says(checkout.check(), "first.patch: its header has no `Reason:`");
}

#[test]
fn check_names_what_is_wrong() {
    let checkout = Checkout::new();
    checkout.setup().unwrap();
    fs::write(checkout.patch_path("stray"), "").unwrap();
    says(checkout.check(), "stray.patch is not listed");
    fs::remove_file(checkout.patch_path("stray")).unwrap();

    checkout.write_patch("second", 17, "line 20", "use ott_backend;");
    says(checkout.check(), "does not say `ott`");
    let shifted = Checkout::new();
    shifted.setup().unwrap();
    let text = shifted
        .patch("second")
        .replace("@@ -17,4 +17,4", "@@ -16,4 +16,4");
    fs::write(shifted.patch_path("second"), text).unwrap();
    says(shifted.check(), "another diff");

    let models = Checkout::new();
    let text = models
        .patch("second")
        .replace("src/lib.rs", "src/models/llama.rs");
    fs::write(models.patch_path("second"), text).unwrap();
    says(models.check(), "touch no model");

    fs::write(
        checkout.project.patches.join("series"),
        "first.patch\nfirst.patch\n",
    )
    .unwrap();
    says(checkout.check(), "twice");
}

#[test]
fn check_compares_the_host_with_the_patches() {
    let checkout = Checkout::new();
    checkout.setup().unwrap();
    checkout.edit("line 10", "edited");
    says(checkout.check(), "edits that are in no patch");
    let git = Git::at(&checkout.project.host);
    git.out(&["commit", "--quiet", "-am", "second: more"])
        .unwrap();
    says(checkout.check(), "the host's `HEAD`");
}
