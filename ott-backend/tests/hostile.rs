//! What comes from outside, at its worst: options, metadata of models, sizes, and pages of arbitrary
//! bytes. Nothing panics; what is refused says what would be taken.

use std::collections::BTreeMap;
use std::sync::Once;

use candle_core::{DType, Device};
use mistralrs_kv_backend::{
    check_servable, register, KvBackendProvider, KvBackendSpec, KvLayer, KvModelSource, KvShape,
};
use ott_backend::cache::{PageHead, TraceState};
use ott_backend::{CpuOps, OttConfig, PageLayout};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

/// Texts that once looked dangerous, one per line.
const CORPUS: &str = include_str!("corpus/options.txt");

fn options() -> impl Strategy<Value = String> {
    let names = vec![
        "bits",
        "k_bits",
        "v_bits",
        "group",
        "residual",
        "outliers",
        "extra",
        "exempt_layers",
        "clip",
        "paper",
        "kivi",
        "",
        "Bits",
    ];
    let values = vec![
        "0",
        "1",
        "2",
        "3",
        "4",
        "8",
        "16",
        "17",
        "32",
        "64",
        "128",
        "254",
        "255",
        "256",
        "-1",
        "18446744073709551616",
        "none",
        "k",
        "",
        " 2 ",
        "2=3",
        "é",
    ];
    let item = prop_oneof![
        8 => (select(names.clone()), select(values)).prop_map(|(name, value)| format!("{name}={value}")),
        2 => select(names).prop_map(String::from),
        1 => any::<String>(),
    ];
    let corpus: Vec<&str> = CORPUS.lines().collect();
    prop_oneof![
        6 => vec(item, 0..6).prop_map(|items| items.join(",")),
        1 => any::<String>(),
        // A known one with something in the middle.
        2 => (select(corpus), any::<char>(), any::<prop::sample::Index>()).prop_map(|(text, c, at)| {
            let at = at.index(text.chars().count() + 1);
            let (before, after): (String, String) = (text.chars().take(at).collect(), text.chars().skip(at).collect());
            format!("{before}{c}{after}")
        }),
    ]
}

/// What must hold for any text after the colon.
fn check_options(options: &str) {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| register(ott_backend::provider()).unwrap());
    let parsed = OttConfig::parse(options);
    match &parsed {
        Ok(config) => {
            config.validate().unwrap();
            let canonical = config.to_string();
            assert_eq!(
                OttConfig::parse(&canonical).as_ref(),
                Ok(config),
                "{options:?}"
            );
        }
        Err(error) => {
            let message = error.to_string();
            for name in ["paper", "k_bits", "exempt_layers", "2, 3, 4 or 8"] {
                assert!(message.contains(name), "{options:?}: {message}");
            }
        }
    }
    let spec = KvBackendSpec::parse(&format!("ott:{options}"));
    // Blanks around the whole are dropped there, which no option notices.
    assert_eq!(spec.is_ok(), parsed.is_ok(), "{options:?}");
    if let Ok(spec) = spec {
        let again = KvBackendSpec::parse(&spec.to_string()).unwrap();
        assert_eq!(again, spec);
        assert_eq!(OttConfig::parse(spec.options()), parsed);
    }
}

#[test]
fn the_corpus_of_options() {
    let (good, bad): (Vec<&str>, Vec<&str>) = CORPUS
        .lines()
        .partition(|line| OttConfig::parse(line).is_ok());
    assert!(
        good.len() >= 5 && bad.len() >= 30,
        "{} / {}",
        good.len(),
        bad.len()
    );
    CORPUS.lines().for_each(check_options);
}

/// JSON as a model's config.json might be, but with anything in any place.
fn json() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("null".to_owned()),
        any::<bool>().prop_map(|b| b.to_string()),
        any::<u64>().prop_map(|n| n.to_string()),
        (0u64..9).prop_map(|n| n.to_string()),
        any::<i64>().prop_map(|n| n.to_string()),
        any::<f64>()
            .prop_filter("no JSON", |x| x.is_finite())
            .prop_map(|x| format!("{x:e}")),
        any::<String>().prop_map(|s| format!("{s:?}")),
        select(vec![
            "\"llama\"",
            "\"gpt_oss\"",
            "\"Gemma3nForCausalLM\"",
            "\"qwen2\"",
            "\"sliding_attention\""
        ])
        .prop_map(String::from),
    ];
    let key = select(vec![
        "head_dim",
        "v_head_dim",
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "kv_lora_rank",
        "max_position_embeddings",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "sliding_window_pattern",
        "layer_types",
        "architectures",
        "model_type",
        "text_config",
        "num_kv_shared_layers",
        "vision_config",
        "attention_chunk_size",
        "layers_block_type",
    ]);
    leaf.prop_recursive(3, 40, 12, move |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(|items| format!("[{}]", items.join(","))),
            vec((key.clone(), inner), 0..12).prop_map(|entries| {
                let entries = entries.iter().map(|(k, v)| format!("\"{k}\":{v}"));
                format!("{{{}}}", entries.collect::<Vec<_>>().join(","))
            }),
        ]
    })
}

fn check_model(source: &KvModelSource<'_>) {
    let _ = (
        source.num_layers(),
        source.num_heads(),
        source.num_kv_heads(),
    );
    let _ = (source.head_dims(), source.max_seq_len());
    if let Err(refusal) = check_servable(source) {
        assert!(!refusal.reasons.is_empty());
    }
    if let Err(error) = ott_backend::provider().check_model(source, "") {
        assert!(error.to_string().contains(source.name), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 512 }))]

    #[test]
    fn options_are_taken_or_refused_with_what_is_valid(options in options()) {
        check_options(&options);
    }

    #[test]
    fn no_metadata_of_a_model_is_too_odd(json in prop_oneof![9 => json(), 1 => any::<String>()]) {
        check_model(&KvModelSource { name: "odd", config_json: Some(&json), gguf: None });
    }

    #[test]
    fn no_metadata_of_a_gguf_file_is_too_odd(
        architecture in prop_oneof![Just("llama".to_owned()), any::<String>()],
        values in vec(prop_oneof![any::<u64>().prop_map(|n| n.to_string()), any::<String>()], 10),
    ) {
        let keys = [
            "attention.chunk_size", "attention.key_length", "embedding_length",
            "attention.kv_lora_rank", "context_length", "attention.head_count", "block_count",
            "attention.head_count_kv", "attention.shared_kv_layers", "attention.value_length",
        ];
        let pairs = keys.iter().zip(values);
        let mut gguf: BTreeMap<String, String> =
            pairs.map(|(key, value)| (format!("{architecture}.{key}"), value)).collect();
        gguf.insert("general.architecture".into(), architecture);
        check_model(&KvModelSource { name: "odd", config_json: None, gguf: Some(&gguf) });
    }

    /// Bytes are answered for any shape that a person may ask for, or refused.
    #[test]
    fn no_shape_is_too_large_to_be_sized(
        layers in 0usize..200,
        (num_heads, num_kv_heads) in (0usize..100_000, 0usize..100_000),
        (k_dim, v_dim) in (any::<usize>(), prop_oneof![Just(64usize), any::<usize>()]),
        max_seqs in prop_oneof![Just(usize::MAX), any::<usize>(), 0usize..64],
        options in prop_oneof![Just(""), Just("kivi"), Just("bits=8,outliers=16,extra=254")],
    ) {
        for k_dim in [k_dim, 128] {
            let layer = KvLayer { num_heads, num_kv_heads, k_dim, v_dim, device: Device::Cpu };
            let _ = ott_backend::provider().memory(&KvShape {
                layers: vec![layer; layers],
                dtype: DType::F16,
                block_size: 128,
                max_seq_len: usize::MAX,
                max_seqs,
                options: options.to_owned(),
            });
        }
    }

    /// A page of any bytes is read within its bounds, by every table of loops.
    #[test]
    fn a_page_of_arbitrary_bytes(
        bytes in vec(any::<u8>(), 4096),
        k_bits in select(vec![2, 3, 4, 8]),
        v_bits in select(vec![2, 3, 4, 8]),
        (group, outliers) in (select(vec![32, 64, 128]), 0usize..17),
        (k_dim, v_dim) in (select(vec![8usize, 24, 64, 80]), select(vec![8usize, 24, 136])),
        boost in select(vec![0, 1, 12, 32]),
    ) {
        let mut options = format!("group={group},outliers={outliers},k_bits={k_bits},v_bits={v_bits}");
        if k_bits == 2 {
            options += &format!(",boost={boost}"); // Names of channels, which may be any, and their third bits.
        }
        let config = OttConfig::parse(&options).unwrap();
        let layout = PageLayout::new(&config, 9, 1, k_dim, v_dim).unwrap();
        let bytes: Vec<u8> = bytes.into_iter().cycle().take(layout.head_bytes).collect();
        let page = PageHead { layout: &layout, bytes: &bytes };
        prop_assert!(page.traced().iter().all(|slot| usize::from(*slot) < group));
        page.dequantize_keys(&mut vec![0.0; group * k_dim], group);
        page.dequantize_values(&mut vec![0.0; group * v_dim]);
        for ops in CpuOps::available() {
            let mut scores = vec![0.0; 2 * group];
            (ops.key_scores)(&page.keys(), &vec![0.5; 2 * k_dim], k_dim, &mut scores);
            (ops.value_sum)(&page.values(), &scores, &mut vec![0.0; 2 * v_dim]);
        }
        let state = TraceState::read(&layout, &bytes);
        let magnitudes: Vec<f32> = (0..group).map(|t| t as f32).collect();
        let (after, traced) = state.trace(&magnitudes, config.extra);
        prop_assert!(traced.len() <= outliers && after.pool.len() == outliers);
        let mut page = vec![0; layout.head_bytes];
        after.write(&traced, &layout, &mut page);
        prop_assert_eq!(TraceState::read(&layout, &page).extra, after.extra);
    }
}
