//! What the documents say of the tests is so.

use std::fs;
use std::path::Path;

#[test]
fn tests_that_back_the_compatibility_matrix_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let matrix = fs::read_to_string(root.join("docs/compatibility.md")).unwrap();
    let spans = matrix.split('`').skip(1).step_by(2);
    let named: Vec<(&str, &str)> = spans.filter_map(|span| span.split_once("::")).collect();
    assert!(named.len() > 20, "{named:?}");
    for (module, test) in named {
        let path = root.join(format!("integration-tests/tests/it/{module}.rs"));
        let source = fs::read_to_string(&path).unwrap_or_default();
        let test = format!("#[test]\nfn {test}()");
        assert!(source.contains(&test), "{} has no {test}", path.display());
    }
}
