//! `OTT_CPU` is obeyed or refused. One test alone in its process, because it changes the environment.

use mistralrs_kv_backend::KvBackendProvider;
use ott_backend::CpuOps;

#[test]
fn the_forced_table_is_taken_and_an_unknown_one_refused() {
    let available = CpuOps::available();
    std::env::remove_var("OTT_CPU");
    let fastest = available.last().unwrap();
    assert_eq!(CpuOps::best().unwrap().name, fastest.name);
    for ops in available {
        std::env::set_var("OTT_CPU", ops.name);
        assert_eq!(CpuOps::best().unwrap().name, ops.name);
        ott_backend::provider().check_options("").unwrap();
    }
    for name in ["sse9", "", "AVX2"] {
        std::env::set_var("OTT_CPU", name);
        // Asked before the weights are read.
        let refusal = ott_backend::provider().check_options("").unwrap_err();
        let expected =
            format!("OTT_CPU={name}: this machine has no such inner loops. It has scalar");
        assert!(refusal.to_string().starts_with(&expected), "{refusal}");
    }
}
