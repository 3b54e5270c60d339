//! A patch file: prose above, a diff below. The prose belongs to people, the diff to `cargo refresh`.

use std::path::Path;

use anyhow::Result;

use crate::project::read;

/// The fields every header has (DEP-3, and `To test`).
pub const FIELDS: [&str; 6] = [
    "Subject",
    "Applies-to",
    "Forwarded",
    "Reason",
    "Last-Update",
    "To test",
];

/// A patch file, cut in two.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Patch {
    /// Everything above the first `diff --git` line.
    pub header: String,
    /// The rest.
    pub diff: String,
}

impl Patch {
    /// Reads a patch file.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self::parse(&read(path)?))
    }

    /// Cuts a patch file's text.
    pub fn parse(text: &str) -> Self {
        let at = if text.starts_with("diff --git ") {
            0
        } else {
            text.find("\ndiff --git ").map_or(text.len(), |at| at + 1)
        };
        Self {
            header: text[..at].to_string(),
            diff: text[at..].to_string(),
        }
    }

    /// The file's text.
    pub fn text(&self) -> String {
        format!("{}{}", self.header, self.diff)
    }

    /// A header field's value, empty if it is missing.
    pub fn field(&self, name: &str) -> &str {
        self.header
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .unwrap_or_default()
            .trim()
    }

    /// The prose: what stands in the header beside its fields.
    pub fn prose(&self) -> String {
        let is_field = |line: &&str| FIELDS.iter().any(|f| line.starts_with(&format!("{f}:")));
        let lines: Vec<_> = self.header.lines().filter(|l| !is_field(l)).collect();
        lines.join("\n").trim().to_string()
    }

    /// Sets `Last-Update`.
    pub fn update(&mut self, date: &str) {
        let mut lines: Vec<String> = self.header.lines().map(str::to_string).collect();
        for line in &mut lines {
            if line.starts_with("Last-Update:") {
                *line = format!("Last-Update: {date}");
            }
        }
        self.header = lines.join("\n") + "\n";
    }

    /// A header for a patch that has none yet; `ott-patches check` fails until a person filled it in.
    pub fn new_header(subject: &str, version: &str, date: &str) -> String {
        format!(
            "Subject: {subject}\nApplies-to: mistral.rs {version}\nForwarded:\nReason:\nLast-Update: {date}\n\n\
             To test:\n\n"
        )
    }

    /// What the diff does, file by file.
    pub fn changes(&self) -> Vec<Change> {
        changes(&self.diff)
    }
}

/// What a diff does to one file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Change {
    pub path: String,
    pub is_new: bool,
    /// The added lines, without their `+`.
    pub added: Vec<String>,
    pub removed: usize,
}

fn changes(diff: &str) -> Vec<Change> {
    let mut changes: Vec<Change> = Vec::new();
    let mut in_hunk = false;
    for line in diff.lines() {
        // Inside a hunk every line starts with ' ', '+', '-', '\' or '@': no content looks like this one.
        if let Some(paths) = line.strip_prefix("diff --git ") {
            let path = paths.rsplit(" b/").next().unwrap_or_default();
            changes.push(Change {
                path: path.to_string(),
                ..Change::default()
            });
            in_hunk = false;
            continue;
        }
        let Some(change) = changes.last_mut() else {
            continue;
        };
        if line.starts_with("@@ ") {
            in_hunk = true;
        } else if !in_hunk {
            change.is_new |= line.starts_with("new file mode");
        } else if let Some(added) = line.strip_prefix('+') {
            change.added.push(added.to_string());
        } else if line.starts_with('-') {
            change.removed += 1;
        }
    }
    changes
}

/// A diff without what changes when nothing did: git's `index` lines, which carry abbreviated hashes.
pub fn quiet(diff: &str) -> String {
    diff.split_inclusive('\n')
        .filter(|line| !line.starts_with("index "))
        .collect()
}
