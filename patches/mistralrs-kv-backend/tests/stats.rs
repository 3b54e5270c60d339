//! What is counted of a cache's use, and how it is told.

use candle_core::{DType, Device, Result, Tensor};
use mistralrs_kv_backend::{
    metrics, toy, KvBackendSpec, KvLayer, KvMeter, KvPlan, KvPool, KvRow, KvShape,
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
