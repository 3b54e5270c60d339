//! What nvcc made of `cuda/*.cu` (build.rs): machine code for every architecture in one image.

macro_rules! fatbin {
    ($name:literal) => {
        include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin"))
    };
}

/// The image of a source file; empty if there is none of that name.
pub(crate) fn image(source: &str) -> Vec<u8> {
    let image: &[u8] = match source {
        "count" => fatbin!("count"),
        "probe" => fatbin!("probe"),
        "store" => fatbin!("store"),
        "seal" => fatbin!("seal"),
        "decode" => fatbin!("decode"),
        "decode_mma" => fatbin!("decode_mma"),
        "prompt" => fatbin!("prompt"),
        "prompt_mma" => fatbin!("prompt_mma"),
        _ => &[],
    };
    image.to_vec()
}
