//! What was meant by an option that nobody knows.

use super::OttConfig;

/// All options.
pub(super) const NAMES: [&str; 12] = [
    "bits",
    "k_bits",
    "v_bits",
    "group",
    "residual",
    "outliers",
    "extra",
    "exempt_layers",
    "clip",
    "rotate",
    "weigh",
    "boost",
];

/// An option in other letters, or with another separator.
pub(super) fn of_name(name: &str) -> Box<str> {
    let meant = name.to_ascii_lowercase().replace('-', "_");
    match NAMES.contains(&meant.as_str()) {
        true => clause(&meant),
        false => "".into(),
    }
}

/// What somebody meant who typed `name` where a preset stands: `2bit`, `8bits`, `8`, `bits4`, `4BIT`.
pub(super) fn of_preset(name: &str) -> Box<str> {
    let lower = name.to_ascii_lowercase();
    let digits: String = lower.chars().filter(char::is_ascii_digit).collect();
    let rest: String = lower.chars().filter(|c| c.is_ascii_alphabetic()).collect();
    let is_preset = |name: &str| !name.is_empty() && OttConfig::PRESETS.contains(&name);
    let meant = match (rest.as_str(), digits.as_str()) {
        _ if is_preset(&lower) => format!("ott:{lower}"),
        ("" | "bit" | "bits" | "b" | "q" | "int", "2") => "ott".to_string(),
        ("" | "bit" | "bits" | "b" | "q" | "int", "3" | "4") => format!("ott:{digits}bit"),
        ("" | "bit" | "bits" | "b" | "q" | "int", "8") => "ott:bits=8".to_string(),
        _ if NAMES.contains(&lower.as_str()) => format!("ott:{lower}=..."),
        _ => return "".into(),
    };
    clause(&meant)
}

fn clause(meant: &str) -> Box<str> {
    format!(": did you mean `{meant}`?").into()
}
