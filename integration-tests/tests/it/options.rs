//! Every option that touches the cache, in each place where it can be given: what a right value does and what a wrong
//! one says. docs/options.md is made of it; `OTT_UPDATE=1 cargo test ... options` writes it anew.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use integration_tests::server::program;
use mistralrs::{
    GgufModelBuilder, MemoryGpuConfig, ModelBuilder, PagedAttentionMetaBuilder, PagedCacheType,
    TextModelBuilder, TokenSource,
};
use mistralrs_server_core::mistralrs_for_server_builder::MistralRsForServerBuilder;

use crate::refusals::{failure, no_weights, LLAMA};
use crate::{alone, block_on};

/// A place, what it is for, and what was tried there.
struct Tried {
    option: &'static str,
    does: &'static str,
    cases: Vec<(String, String)>,
}

/// A model folder without weights.
pub fn folder() -> Result<PathBuf> {
    no_weights("options", LLAMA)
}

/// What a program says that must fail, where it says it, on one line and without what depends on the machine.
fn said(command: &mut Command) -> Result<String> {
    let (status, text) = failure(command)?;
    let place = match status {
        Some(2) => "command line: ",
        _ => "",
    };
    Ok(format!("{place}{}", tidy(&text)))
}

/// The sentence, or `taken` if weights were missed.
fn tidy(text: &str) -> String {
    let text = text.split("\n\nUsage:").next().unwrap_or_default();
    let text = text
        .split("\n\nFor more information")
        .next()
        .unwrap_or_default();
    let words: Vec<&str> = text.split_whitespace().collect();
    let text = words.join(" ");
    let text = text
        .trim_start_matches("Error: ")
        .trim_start_matches("error: ");
    if ["safetensors", "weights", "HeaderTooLarge", "InvalidHeader"]
        .iter()
        .any(|missed| text.contains(missed))
    {
        return "taken".to_string();
    }
    // The machine's memory is not the option's matter.
    let numbers = |(before, rest): (&str, &str)| {
        let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        format!("{before}the device has N{rest}")
    };
    let text = text
        .split_once("the device has ")
        .map_or_else(|| text.to_string(), numbers);
    // The long list of what a spec takes is in the README.
    match text.split_once(" (valid: ") {
        Some((cause, _)) => format!("{cause} (valid: ...)"),
        None => text,
    }
}

fn flags(args: &[&str]) -> Result<String> {
    let mut command = Command::new(program("mistralrs")?);
    command.args(["--token-source", "none", "serve"]);
    // What stands before a model type is all that is tried there.
    if !args.ends_with(&["auto", "-m", "x"]) {
        command.args(["--cpu", "-m"]).arg(folder()?);
    }
    said(command.args(args))
}

fn file(text: &str) -> Result<String> {
    let folder = folder()?;
    let path = folder.join("options.toml");
    let model = format!(
        "\n[[models]]\nkind = \"auto\"\nmodel_id = {folder:?}\ndevice = {{ cpu = true }}\n"
    );
    let global = "command = \"serve\"\n";
    let (top, tables) = text.split_at(text.find('[').unwrap_or(text.len()));
    let text = format!("{global}{top}[global]\ntoken_source = \"none\"\n{tables}{model}");
    std::fs::write(&path, text)?;
    let mut command = Command::new(program("mistralrs")?);
    said(command.args(["from-config", "--file"]).arg(path))
}

/// The flags of `serve`, and what was tried with each.
fn of_serve() -> Result<Vec<Tried>> {
    let tried = |option, does, cases: &[&[&str]]| -> Result<Tried> {
        let told = |args: &&[&str]| Ok((args.join(" "), flags(args)?));
        Ok(Tried {
            option,
            does,
            cases: cases.iter().map(told).collect::<Result<_>>()?,
        })
    };
    const KV: &str = "--kv-cache";
    Ok(vec![
        tried(
            "--kv-cache SPEC",
            "keep keys and values in a registered backend",
            &[
                &[KV, "ott"],
                &[KV, "ott:4bit"],
                &[KV, "zip"],
                &[KV, "OTT"],
                &[KV, "ott=4bit"],
                &[KV, "ott bits=4"],
                &[KV, "ott:2bit"],
                &[KV, "ott:8bit"],
                &[KV, "ott:best"],
            ],
        )?,
        tried(
            "bits, k_bits, v_bits",
            "bits of a code",
            &[
                &[KV, "ott:bits=1"],
                &[KV, "ott:k_bits=5"],
                &[KV, "ott:v_bits=x"],
                &[KV, "ott:bits=4,k_bits=4"],
            ],
        )?,
        tried(
            "group, residual",
            "tokens that share a scale; newest tokens in full precision",
            &[
                &[KV, "ott:group=96"],
                &[KV, "ott:residual=40"],
                &[KV, "ott:group=32,residual=64"],
            ],
        )?,
        tried(
            "outliers, extra, exempt_layers",
            "what is traced",
            &[
                &[KV, "ott:outliers=17"],
                &[KV, "ott:extra=255"],
                &[KV, "ott:exempt_layers=999"],
                &[KV, "ott:outliers=0,extra=8"],
            ],
        )?,
        tried(
            "clip, weigh, rotate, boost",
            "how codes are chosen",
            &[
                &[KV, "ott:clip=v"],
                &[KV, "ott:weigh=k"],
                &[KV, "ott:rotate=k"],
                &[KV, "ott:boost=33"],
                &[KV, "ott:bits=8,boost=4"],
            ],
        )?,
        tried(
            "--paged-attn MODE",
            "PagedAttention, which a backend works through",
            &[
                &[KV, "ott", "--paged-attn", "on"],
                &[KV, "ott", "--paged-attn", "off"],
                &[KV, "ott", "--paged-attn", "maybe"],
            ],
        )?,
        tried(
            "--no-kv-cache",
            "no cache at all",
            &[&[KV, "ott", "--no-kv-cache"]],
        )?,
        tried(
            "--pa-context-len N",
            "the pool in tokens, of all running sequences together",
            &[
                &[KV, "ott", "--pa-context-len", "1024"],
                &[KV, "ott", "--pa-context-len", "0"],
                &[KV, "ott", "--pa-context-len", "-1"],
                &[KV, "ott", "--pa-context-len", "100000000000"],
                &["--pa-context-len", "1024"],
                &["--pa-context-len", "1024", "auto", "-m", "x"],
            ],
        )?,
        tried(
            "--pa-memory-mb N",
            "the pool in MiB, windows counted",
            &[
                &[KV, "ott", "--pa-memory-mb", "64"],
                &[KV, "ott", "--pa-memory-mb", "0"],
                &[KV, "ott", "--pa-memory-mb", "100000000"],
                &[KV, "ott", "--pa-memory-mb", "1", "--max-seqs", "1000"],
                &["--pa-memory-mb", "64"],
                &[KV, "ott", "--pa-memory-mb", "64", "--pa-context-len", "64"],
            ],
        )?,
        tried(
            "--pa-memory-fraction X",
            "the pool as a share of the device's memory, what else is in use counted",
            &[
                &[KV, "ott", "--pa-memory-fraction", "0.5"],
                &[KV, "ott", "--pa-memory-fraction", "0"],
                &[KV, "ott", "--pa-memory-fraction=-0.5"],
                &[KV, "ott", "--pa-memory-fraction", "1.5"],
                &[KV, "ott", "--pa-memory-fraction", "90"],
                &[KV, "ott", "--pa-memory-fraction", "nan"],
                &["--pa-memory-fraction", "0.5"],
                &[
                    KV,
                    "ott",
                    "--pa-memory-fraction",
                    "0.5",
                    "--pa-memory-mb",
                    "64",
                ],
            ],
        )?,
        tried(
            "--pa-block-size N",
            "tokens of a block; of `ott`, its group",
            &[
                &[KV, "ott", "--pa-block-size", "128"],
                &[KV, "ott", "--pa-block-size", "0"],
                &[KV, "ott", "--pa-block-size", "16"],
                &["--pa-block-size", "32"],
            ],
        )?,
        tried(
            "--pa-cache-type TYPE",
            "the format of PagedAttention's own cache",
            &[
                &[KV, "ott", "--pa-cache-type", "auto"],
                &[KV, "ott", "--pa-cache-type", "f8e4m3"],
                &[KV, "ott", "--pa-cache-type", "q4"],
                &["--pa-cache-type", "f8e4m3"],
            ],
        )?,
        tried(
            "--max-seqs N",
            "sequences that run at once; each may have a window",
            &[
                &[KV, "ott", "--max-seqs", "1"],
                &[KV, "ott", "--max-seqs", "100000000"],
            ],
        )?,
        tried(
            "--prefix-cache-n N",
            "0 switches prefix hits off; other numbers are for the host's own cache",
            &[
                &[KV, "ott", "--prefix-cache-n", "0"],
                &[KV, "ott", "--prefix-cache-n", "-1"],
            ],
        )?,
        tried(
            "before a model type",
            "options of the model stand after it",
            &[&[KV, "ott", "auto", "-m", "x"]],
        )?,
    ])
}

/// The keys of a TOML file.
fn of_file() -> Result<Vec<Tried>> {
    let tried = |option, does, cases: &[&str]| -> Result<Tried> {
        let told = |text: &&str| Ok((text.replace('\n', " "), file(text)?));
        Ok(Tried {
            option,
            does,
            cases: cases.iter().map(told).collect::<Result<_>>()?,
        })
    };
    Ok(vec![
        tried(
            "[paged_attn] kv_cache",
            "as `--kv-cache`",
            &[
                "[paged_attn]\nkv_cache = \"ott:4bit\"",
                "[paged_attn]\nkv_cache = \"ott:5bit\"",
                "[paged_attn]\nkv_cache = 4",
                "[paged_attn]\nkv-cache = \"ott\"",
                "[paged_attn]\nkvcache = \"ott\"",
                "[paged-attn]\nkv_cache = \"ott\"",
                "[runtime]\nkv_cache = \"ott\"",
                "kv_cache = \"ott\"\n",
            ],
        )?,
        tried(
            "[paged_attn] mode",
            "as `--paged-attn`",
            &[
                "[paged_attn]\nkv_cache = \"ott\"\nmode = \"off\"",
                "[paged_attn]\nkv_cache = \"ott\"\nmode = \"maybe\"",
            ],
        )?,
        tried(
            "[paged_attn] context_len, memory_mb, memory_fraction",
            "as `--pa-context-len` and so on",
            &[
                "[paged_attn]\nkv_cache = \"ott\"\ncontext_len = 1024",
                "[paged_attn]\nkv_cache = \"ott\"\ncontext_len = 0",
                "[paged_attn]\nkv_cache = \"ott\"\nmemory_mb = 0",
                "[paged_attn]\nkv_cache = \"ott\"\nmemory_fraction = 1.5",
                "[paged_attn]\nkv_cache = \"ott\"\ncontext_len = \"many\"",
                "[paged_attn]\nkv_cache = \"ott\"\ncontext_len = 64\nmemory_mb = 64",
                "[paged_attn]\ncontext_len = 64",
            ],
        )?,
        tried(
            "[paged_attn] block_size, cache_type",
            "as `--pa-block-size`, `--pa-cache-type`",
            &[
                "[paged_attn]\nkv_cache = \"ott\"\nblock_size = 16",
                "[paged_attn]\nkv_cache = \"ott\"\ncache_type = \"q4\"",
                "[paged_attn]\nkv_cache = \"ott\"\ncache_type = \"F8E4M3\"",
            ],
        )?,
        tried(
            "[runtime] max_seqs, no_kv_cache, prefix_cache_n",
            "as the flags of these names",
            &[
                "[paged_attn]\nkv_cache = \"ott\"\n[runtime]\nno_kv_cache = true",
                "[paged_attn]\nkv_cache = \"ott\"\n[runtime]\nmax_seqs = 100000000",
                "[runtime]\nmax-seqs = 4",
            ],
        )?,
    ])
}

/// The builders of the Rust libraries.
fn of_rust() -> Result<Vec<Tried>> {
    let folder = folder()?;
    let model = folder.to_string_lossy().into_owned();
    let text = || {
        TextModelBuilder::new(&model)
            .with_token_source(TokenSource::None)
            .with_force_cpu()
    };
    fn told<T>(built: Result<T>) -> String {
        built.map_or_else(|error| tidy(&error.to_string()), |_| "taken".to_string())
    }
    let sized = |memory| {
        let paged = PagedAttentionMetaBuilder::default().with_gpu_memory(memory);
        told(paged.with_kv_cache("ott").build())
    };
    let case = |what: &str, said: String| (what.to_string(), said);
    let memory = Tried {
        option: "PagedAttentionMetaBuilder::with_gpu_memory",
        does: "the pool: tokens, MiB or a share",
        cases: vec![
            case(
                "ContextSize(1024)",
                sized(MemoryGpuConfig::ContextSize(1024)),
            ),
            case("ContextSize(0)", sized(MemoryGpuConfig::ContextSize(0))),
            case("MbAmount(0)", sized(MemoryGpuConfig::MbAmount(0))),
            case("Utilization(1.5)", sized(MemoryGpuConfig::Utilization(1.5))),
            case(
                "Utilization(NAN)",
                sized(MemoryGpuConfig::Utilization(f32::NAN)),
            ),
        ],
    };
    let paged = |spec: &str| {
        PagedAttentionMetaBuilder::default()
            .with_kv_cache(spec)
            .build()
    };
    let cached = PagedAttentionMetaBuilder::default()
        .with_kv_cache("ott")
        .with_paged_cache_type(PagedCacheType::F8E4M3)
        .build()?;
    let spec = Tried {
        option: "PagedAttentionMetaBuilder::with_kv_cache",
        does: "as `--kv-cache`",
        cases: vec![
            case("\"ott\"", told(paged("ott"))),
            case("\"zip\"", told(paged("zip"))),
            case(
                "with_paged_cache_type(F8E4M3)",
                told(block_on(text().with_paged_attn(cached).build())),
            ),
        ],
    };
    let other = paged("ott:4bit")?;
    let huge = PagedAttentionMetaBuilder::default()
        .with_gpu_memory(MemoryGpuConfig::ContextSize(100_000_000_000))
        .build()?;
    let builders = Tried {
        option: "TextModelBuilder, GgufModelBuilder, ModelBuilder: with_kv_cache",
        does: "as `--kv-cache`",
        cases: vec![
            case(
                "\"ott\"",
                told(block_on(text().with_kv_cache("ott").build())),
            ),
            case(
                "\"OTT\"",
                told(block_on(text().with_kv_cache("OTT").build())),
            ),
            case(
                "\"ott\", with_no_kv_cache",
                told(block_on(
                    text().with_kv_cache("ott").with_no_kv_cache().build(),
                )),
            ),
            case(
                "\"ott\", with_paged_attn of \"ott:4bit\"",
                told(block_on(
                    text().with_kv_cache("ott").with_paged_attn(other).build(),
                )),
            ),
            case(
                "\"ott\", with_paged_attn of 10^11 tokens",
                told(block_on(
                    text().with_kv_cache("ott").with_paged_attn(huge).build(),
                )),
            ),
            case(
                "GgufModelBuilder, \"ott:bits=1\"",
                told(block_on(
                    GgufModelBuilder::new(&model, vec!["none.gguf"])
                        .with_token_source(TokenSource::None)
                        .with_kv_cache("ott:bits=1")
                        .build(),
                )),
            ),
            case(
                "ModelBuilder, \"ott:bits=1\"",
                told(block_on(
                    ModelBuilder::new(&model)
                        .with_token_source(TokenSource::None)
                        .with_kv_cache("ott:bits=1")
                        .build(),
                )),
            ),
        ],
    };
    let server = |set: &dyn Fn(MistralRsForServerBuilder) -> MistralRsForServerBuilder| {
        let builder = MistralRsForServerBuilder::new()
            .with_model(selected_model(&model))
            .with_cpu(true)
            .with_token_source(TokenSource::None);
        told(block_on(set(builder).build()))
    };
    let servers = Tried {
        option: "MistralRsForServerBuilder: with_kv_cache, with_paged_*",
        does: "as the flags",
        cases: vec![
            case(
                "with_kv_cache(\"ott\"), with_paged_ctxt_len(0)",
                server(&|b| b.with_kv_cache("ott".into()).with_paged_ctxt_len(0)),
            ),
            case(
                "with_kv_cache(\"ott\"), with_paged_ctxt_len(64), with_paged_attn_gpu_mem(64)",
                server(&|b| {
                    let b = b.with_kv_cache("ott".into()).with_paged_ctxt_len(64);
                    b.with_paged_attn_gpu_mem(64)
                }),
            ),
            case(
                "with_paged_attn_gpu_mem_usage(0.5)",
                server(&|b| b.with_paged_attn_gpu_mem_usage(0.5)),
            ),
        ],
    };
    Ok(vec![spec, memory, builders, servers])
}

fn selected_model(folder: &str) -> mistralrs_core::ModelSelected {
    use mistralrs_core::AutoDeviceMapParams as Params;
    mistralrs_core::ModelSelected::Plain {
        model_id: folder.to_owned(),
        tokenizer_json: None,
        arch: None,
        dtype: mistralrs_core::ModelDType::Auto,
        topology: None,
        organization: None,
        write_uqff: None,
        from_uqff: None,
        imatrix: None,
        calibration_file: None,
        max_seq_len: Params::DEFAULT_MAX_SEQ_LEN,
        max_batch_size: Params::DEFAULT_MAX_BATCH_SIZE,
        hf_cache_path: None,
        matformer_config_path: None,
        matformer_slice_name: None,
    }
}

fn page(places: &[(&str, Vec<Tried>)]) -> String {
    let mut page = String::from(
        "# Options that touch the cache\n\n\
         Made by a test that tries them all (`options::every_option_is_taken_or_refused`); to write it anew after a\n\
         change, run the integration tests with `OTT_UPDATE=1`. \"Taken\" means: all is in order up to the weights. What\n\
         is refused is refused before weights are read, by the command line itself where that is said. N stands for what\n\
         depends on the machine.\n",
    );
    for (place, all) in places {
        let _ = write!(page, "\n## {place}\n");
        for tried in all {
            let _ = write!(
                page,
                "\n**`{}`**: {}.\n\n| tried | answer |\n|---|---|\n",
                tried.option, tried.does
            );
            for (what, said) in &tried.cases {
                let _ = writeln!(page, "| `{what}` | {} |", said.replace('|', "\\|"));
            }
        }
    }
    page
}

#[test]
fn every_option_is_taken_or_refused() -> Result<()> {
    let _alone = alone();
    let places = [
        (
            "The command line: `mistralrs serve`, `run`, `bench`, `tune`",
            of_serve()?,
        ),
        ("A TOML file: `mistralrs from-config`", of_file()?),
        ("Rust", of_rust()?),
    ];
    for (_, all) in &places {
        for (what, said) in all.iter().flat_map(|tried| &tried.cases) {
            assert!(
                !said.is_empty() && !said.contains("panicked"),
                "{what}: {said}"
            );
        }
    }
    let page = page(&places);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/options.md");
    if std::env::var_os("OTT_UPDATE").is_some() {
        std::fs::write(&path, &page)?;
    }
    let held = std::fs::read_to_string(&path).context("docs/options.md")?;
    for (held, now) in held.lines().zip(page.lines()) {
        assert_eq!(held, now, "docs/options.md; OTT_UPDATE=1 writes it anew");
    }
    assert_eq!(held.lines().count(), page.lines().count());
    Ok(())
}
