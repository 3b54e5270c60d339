//! What is counted of a cache's use, and how it is told.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use candle_core::{DType, Device, Result, Tensor};
use mistralrs_kv_backend::{
    metrics, toy, KvBackendSpec, KvGauge, KvLayer, KvMeter, KvPlan, KvPool, KvReport, KvRow,
    KvShape, KvStats,
};

/// A toy cache of two layers with four blocks of four tokens.
fn meter() -> anyhow::Result<KvMeter> {
    let provider = toy::provider();
    mistralrs_kv_backend::register(provider.clone())?;
    let layer = KvLayer {
        num_heads: 2,
        num_kv_heads: 1,
        k_dim: 8,
        v_dim: 8,
        device: Device::Cpu,
    };
    let shape = KvShape {
        layers: vec![layer; 2],
        dtype: DType::F32,
        block_size: 4,
        max_seq_len: 64,
        max_seqs: 2,
        options: "block=4".into(),
    };
    let memory = provider.memory(&shape)?;
    let pool = KvPool {
        spec: KvBackendSpec::parse("toy-f32:block=4")?,
        block_size: 4,
        num_blocks: 5,
        block_bytes: memory.per_block,
        bytes: 5 * memory.per_block + memory.fixed,
    };
    Ok(KvMeter::new(provider.create(shape, 5)?, pool))
}

#[test]
fn a_sequence_is_counted_and_told() -> anyhow::Result<()> {
    let meter = meter()?;
    assert_eq!(meter.report().free_blocks, 4);
    meter.backend().allocated(1, &[1, 2]);
    meter.admitted(6, 4);
    meter.pool(2, 1);
    let row = KvRow {
        seq: 1,
        past: 0,
        new: 6,
        blocks: vec![1, 2],
    };
    let plan = KvPlan {
        prompt: true,
        block_size: 4,
        rows: vec![row],
    };
    let step = meter.step(true, || meter.backend().begin_step(plan.clone()))?;
    let x = Tensor::zeros((1, 1, 6, 8), DType::F32, &Device::Cpu)?;
    for layer in 0..2 {
        meter.step(false, || step.append(layer, &x, &x, &x))?;
    }
    let failed: Result<()> = meter.step(false, || step.append(2, &x, &x, &x));
    assert!(failed.is_err(), "there is no layer 2");
    let panicked: Result<()> = meter.step(false, || panic!("{} is odd", 3));
    let panicked = panicked.map_err(|error| error.to_string());
    let words = "the KV-cache backend `toy-f32:block=4` panicked: 3 is odd. This is a defect; the log says where.";
    assert_eq!(panicked.expect_err("it panicked"), words);
    meter.preempted();

    let report = meter.report();
    assert_eq!((report.steps, report.failed_steps), (1, 2));
    assert_eq!(report.stats.tokens, Some(6));
    assert!(report.bytes_held <= report.bytes_granted);
    let text = metrics(&[("C:\\a \"model\"".into(), report)])?;
    let mut lines: Vec<&str> = text.lines().filter(|l| !l.starts_with("# HELP")).collect();
    // Series of one metric come in any order.
    lines.sort_by_key(|line| line.trim_start_matches("# TYPE "));
    insta::assert_snapshot!(lines.join("\n"));
    Ok(())
}

/// Of two models with different backends: one tells no bits, and they share a gauge.
fn two_models() -> [(String, KvReport); 2] {
    let report = |spec: &str, bits, own| {
        let gauge = |name| KvGauge {
            name,
            help: "Blocks",
            by_layer: vec![1.0, 2.0],
        };
        KvReport {
            spec: spec.into(),
            stats: KvStats {
                setting: "k_bits=2,\nv=\"x\"".into(),
                bits_per_number: bits,
                tokens: Some(7),
                gauges: vec![gauge("sealed_blocks"), gauge(own)],
            },
            bytes_granted: 4,
            bytes_held: 3,
            bytes_used: 2,
            bytes_free: 1,
            block_size: 128,
            blocks: 3,
            free_blocks: 1,
            evicted_blocks: 0,
            sequences: 0,
            preempted: 0,
            prompt_tokens: 9,
            hit_tokens: 0,
            steps: 0,
            failed_steps: 0,
        }
    };
    // The second gauge of the second has the name of one that all have.
    [
        ("a/b \\ \"c\"".into(), report("one", Some(2.5), "window")),
        ("second".into(), report("two", None, "blocks")),
    ]
}

/// OpenMetrics describes a family once, and keeps its samples together.
#[test]
fn two_models_make_one_family_each() -> anyhow::Result<()> {
    let text = metrics(&two_models())?;
    let (mut described, mut now) = (HashSet::new(), "");
    for line in text.lines().filter(|line| *line != "# EOF") {
        if let Some(help) = line.strip_prefix("# HELP ") {
            now = help.split(' ').next().unwrap_or_default();
            assert!(described.insert(now), "{now} is described twice:\n{text}");
        } else {
            let line = line.strip_prefix("# TYPE ").unwrap_or(line);
            assert!(line.starts_with(now), "{line} stands under {now}:\n{text}");
        }
    }
    for name in [
        "setting",
        "tokens",
        "bits_per_number",
        "sealed_blocks",
        "steps",
    ] {
        assert!(
            described.contains(&*format!("kv_cache_{name}")),
            "{name}:\n{text}"
        );
    }
    let of = |start: &str| text.lines().filter(|line| line.starts_with(start)).count();
    assert_eq!(of("kv_cache_tokens{"), 2);
    assert_eq!(of("kv_cache_setting_info{"), 2);
    assert_eq!(of("kv_cache_sealed_blocks{"), 4);
    assert_eq!(of("kv_cache_blocks{"), 4);
    Ok(())
}

/// A Python that has the reference parser, made once; `None` where there is no Python or no registry.
fn python() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-openmetrics");
    let python = folder.join("bin/python");
    let works = |program: &Path, args: &[&str]| {
        let mut command = Command::new(program);
        let done = command.args(args).stderr(Stdio::null()).status();
        done.is_ok_and(|status| status.success())
    };
    if !works(&python, &["-c", "import prometheus_client"]) {
        let folder = folder.to_string_lossy();
        let made = works(Path::new("python3"), &["-m", "venv", &*folder]);
        let package = "prometheus-client>=0.20,<1";
        if !made || !works(&python, &["-m", "pip", "install", "--quiet", package]) {
            return None;
        }
    }
    Some(python)
}

#[test]
fn the_reference_parser_reads_the_metrics() -> anyhow::Result<()> {
    let Some(python) = python() else {
        eprintln!("SKIPPED: prometheus_client for Python cannot be installed here");
        return Ok(());
    };
    let program = "import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read
for family in read(sys.stdin.read()):
    print(family.name, family.type, len(family.samples))
    if family.name == 'kv_cache_setting':
        print([s.labels for s in family.samples])";
    for models in [&two_models()[..], &two_models()[..1], &[]] {
        let text = metrics(models)?;
        let mut parser = Command::new(&python)
            .args(["-c", program])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = parser.stdin.take() {
            std::io::Write::write_all(&mut stdin, text.as_bytes())?;
        }
        let said = parser.wait_with_output()?;
        let error = String::from_utf8_lossy(&said.stderr);
        assert!(said.status.success(), "{error}\n{text}");
        let said = String::from_utf8(said.stdout)?;
        let families = said.lines().filter(|l| l.starts_with("kv_cache_")).count();
        if models.len() == 2 {
            assert!(said.contains("kv_cache_tokens gauge 2"), "{said}");
            assert!(said.contains("kv_cache_hit_tokens counter 2"), "{said}");
            assert!(said.contains("kv_cache_setting info 2"), "{said}");
            // What was put in comes out.
            assert!(said.contains(r#"'model': 'a/b \\ "c"'"#), "{said}");
            assert!(said.contains(r#"'setting': 'k_bits=2,\nv="x"'"#), "{said}");
            assert!(families > 17, "{said}");
        }
    }
    Ok(())
}
