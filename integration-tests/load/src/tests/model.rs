//! The model that is written can be read.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use crate::model::{write, Shape};

const SMALL: Shape = Shape {
    layers: 2,
    hidden: 64,
    ffn: 96,
    heads: 4,
    kv_heads: 2,
    vocabulary: 300,
};

fn numbers(value: &Value) -> Vec<usize> {
    let numbers = value.as_array().unwrap().iter();
    numbers.map(|n| n.as_u64().unwrap() as usize).collect()
}

#[test]
fn headers_describe_the_files_to_the_last_byte() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = write(folder.path(), &SMALL).unwrap();
    let (mut shapes, mut total) = (BTreeMap::new(), 0);
    for i in 1..=3 {
        let file = fs::read(
            folder
                .path()
                .join(format!("model-{i:05}-of-00003.safetensors")),
        )
        .unwrap();
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header: BTreeMap<String, Value> = serde_json::from_slice(&file[8..8 + length]).unwrap();
        let data = &file[8 + length..];
        let mut parts: Vec<(usize, usize)> = Vec::new();
        for (name, tensor) in header {
            assert_eq!(tensor["dtype"], "BF16");
            let (shape, ends) = (numbers(&tensor["shape"]), numbers(&tensor["data_offsets"]));
            assert_eq!(
                ends[1] - ends[0],
                2 * shape.iter().product::<usize>(),
                "{name}"
            );
            parts.push((ends[0], ends[1]));
            shapes.insert(name, shape);
        }
        // One after the other, without holes.
        parts.sort_unstable();
        assert_eq!(parts[0].0, 0);
        assert!(
            parts.windows(2).all(|pair| pair[0].1 == pair[1].0),
            "{parts:?}"
        );
        assert_eq!(parts.last().unwrap().1, data.len());
        total += data.len();
        let numbers: Vec<f32> = data
            .chunks(2)
            .map(|b| f32::from_bits(u32::from(b[1]) << 24 | u32::from(b[0]) << 16))
            .collect();
        let n = numbers.len() as f32;
        let deviation = (numbers.iter().map(|x| x * x).sum::<f32>() / n).sqrt();
        assert!((0.018..0.022).contains(&deviation), "{deviation}");
    }
    assert_eq!(total, bytes);
    let lines: Vec<String> = shapes
        .iter()
        .map(|(name, shape)| format!("{name} {shape:?}"))
        .collect();
    insta::assert_snapshot!(lines.join("\n"));
}

#[test]
fn config_and_tokenizer_fit_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &SMALL).unwrap();
    let read = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(folder.path().join(name)).unwrap()).unwrap()
    };
    let config = serde_json::to_string_pretty(&read("config.json")).unwrap();
    insta::assert_snapshot!(config);
    let words = read("tokenizer.json")["model"]["vocab"].clone();
    let words = words.as_object().unwrap();
    assert_eq!(words.len(), 300);
    assert!(words.iter().all(|(word, id)| *word == format!("w{id}")));
}

#[test]
fn shapes_that_no_model_has_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let odd = Shape { heads: 3, ..SMALL };
    insta::assert_snapshot!(write(folder.path(), &odd).unwrap_err());
    let none = Shape { layers: 0, ..SMALL };
    assert!(write(folder.path(), &none).is_err());
}
