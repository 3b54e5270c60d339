//! The kernels against the scalar code, on a GPU or on the shim (`tests/shim`): pages byte for byte, traced tokens and
//! the window bit for bit, attention within a budget.

use std::sync::Arc;

use anyhow::{ensure, Result};
use half::{bf16, f16};
use ott_backend::attention::{decode, Queries};
use ott_backend::cache::{Cache, Element, LayerSpec, NewQueries, NewTokens, Tokens};
use ott_backend::rotate::{rotate, rotate_back};
use ott_backend::{CpuOps, OttConfig, PageLayout, Rotation, Weigh};
use ott_kernels::abi::{self, Fresh, Layer, Prompt, Query, CLEAR_QUERIES, PARTIAL, TILE_QUERIES};
use ott_kernels::blocks::{Blocks, Row, RowPlan};
use ott_kernels::plan::Plan;
use ott_kernels::shape::LayerShape;

use crate::device::{address, Attention, DeviceLayer, DevicePlan, Dtype, Kernels};
use crate::paint::{keys, queries, values, Noise};

/// Largest difference allowed, relative to the row's largest number: the clear kernels add in f32 and round once; the
/// tensor-core kernel has factors of 16 bits.
const CLEAR: f64 = 6e-4;
const TUNED: f64 = 1e-3;
/// bf16 rounds results to 8 bits.
const BF16: f64 = 5e-3;

const KERNELS: [Attention; 3] = [Attention::Clear, Attention::Narrow, Attention::Wide];

struct Case {
    options: &'static str,
    dim: usize,
    kv_heads: usize,
    ratio: usize,
    softcap: f32,
    /// Prompt lengths of the rows.
    prompts: &'static [usize],
    /// Decode steps after them.
    steps: usize,
    /// Steps that a prompt comes in.
    pieces: usize,
    /// The one of them whose queries are not given.
    silent: Option<usize>,
}

/// Prompts in one step.
const WHOLE: Case = Case {
    options: "",
    dim: 128,
    kv_heads: 1,
    ratio: 1,
    softcap: 0.0,
    prompts: &[],
    steps: 0,
    pieces: 1,
    silent: None,
};

const CASES: [Case; 33] = [
    Case {
        options: "",
        dim: 128,
        kv_heads: 2,
        ratio: 4,
        softcap: 0.0,
        prompts: &[1, 159, 160, 1000, 3000],
        steps: 4,
        ..WHOLE
    },
    Case {
        options: "paper",
        dim: 64,
        kv_heads: 3,
        ratio: 3,
        softcap: 0.0,
        prompts: &[127, 128, 129, 700, 2500],
        steps: 40,
        ..WHOLE
    },
    Case {
        options: "",
        dim: 64,
        kv_heads: 2,
        ratio: 7,
        softcap: 0.0,
        prompts: &[31, 288, 1500],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "boost=0,clip=k",
        dim: 128,
        kv_heads: 2,
        ratio: 8,
        softcap: 0.0,
        prompts: &[400, 1100],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "rotate=none",
        dim: 128,
        kv_heads: 2,
        ratio: 5,
        softcap: 0.0,
        prompts: &[400, 1100],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "boost=0,rotate=none",
        dim: 64,
        kv_heads: 2,
        ratio: 4,
        softcap: 0.0,
        prompts: &[400, 1100],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "boost=32",
        dim: 128,
        kv_heads: 1,
        ratio: 4,
        softcap: 30.0,
        prompts: &[700, 1500],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "boost=13",
        dim: 128,
        kv_heads: 2,
        ratio: 1,
        softcap: 0.0,
        prompts: &[700],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "boost=1,residual=0",
        dim: 64,
        kv_heads: 2,
        ratio: 8,
        softcap: 0.0,
        prompts: &[700, 128],
        steps: 40,
        ..WHOLE
    },
    Case {
        options: "bits=4",
        dim: 128,
        kv_heads: 1,
        ratio: 8,
        softcap: 0.0,
        prompts: &[500, 1300],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "bits=4,rotate=none",
        dim: 64,
        kv_heads: 2,
        ratio: 1,
        softcap: 0.0,
        prompts: &[500, 1300],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "bits=3",
        dim: 128,
        kv_heads: 2,
        ratio: 2,
        softcap: 0.0,
        prompts: &[900],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "k_bits=3,rotate=none",
        dim: 64,
        kv_heads: 2,
        ratio: 4,
        softcap: 0.0,
        prompts: &[900, 333],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "k_bits=4",
        dim: 128,
        kv_heads: 2,
        ratio: 4,
        softcap: 30.0,
        prompts: &[900, 333],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "v_bits=4",
        dim: 128,
        kv_heads: 2,
        ratio: 4,
        softcap: 0.0,
        prompts: &[900, 333],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "bits=3,boost=12",
        dim: 128,
        kv_heads: 2,
        ratio: 4,
        softcap: 0.0,
        prompts: &[900, 333],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "bits=4,boost=12",
        dim: 64,
        kv_heads: 1,
        ratio: 8,
        softcap: 0.0,
        prompts: &[900, 333],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "outliers=0",
        dim: 128,
        kv_heads: 2,
        ratio: 4,
        softcap: 0.0,
        prompts: &[2000],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "outliers=16,extra=40,exempt_layers=0",
        dim: 64,
        kv_heads: 2,
        ratio: 4,
        softcap: 0.0,
        prompts: &[2000],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "group=32,residual=32,bits=8",
        dim: 96,
        kv_heads: 2,
        ratio: 2,
        softcap: 0.0,
        prompts: &[200, 77],
        steps: 40,
        ..WHOLE
    },
    Case {
        options: "group=32,boost=20",
        dim: 80,
        kv_heads: 2,
        ratio: 2,
        softcap: 0.0,
        prompts: &[200, 77],
        steps: 10,
        ..WHOLE
    },
    Case {
        options: "group=64",
        dim: 256,
        kv_heads: 1,
        ratio: 2,
        softcap: 20.0,
        prompts: &[300],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "weigh=none",
        dim: 128,
        kv_heads: 2,
        ratio: 1,
        prompts: &[500, 160],
        steps: 3,
        ..WHOLE
    },
    Case {
        options: "weigh=none,group=32,boost=9",
        dim: 72,
        kv_heads: 1,
        ratio: 7,
        prompts: &[200],
        steps: 40,
        pieces: 3,
        ..WHOLE
    },
    // Samples from the window and new ones in one group.
    Case {
        options: "",
        dim: 128,
        kv_heads: 1,
        ratio: 3,
        prompts: &[600, 335],
        steps: 40,
        pieces: 4,
        ..WHOLE
    },
    Case {
        options: "boost=0",
        dim: 64,
        kv_heads: 2,
        ratio: 1,
        prompts: &[300, 520],
        steps: 3,
        pieces: 3,
        ..WHOLE
    },
    Case {
        options: "group=32,residual=0",
        dim: 72,
        kv_heads: 2,
        ratio: 7,
        prompts: &[131, 77],
        steps: 40,
        pieces: 5,
        ..WHOLE
    },
    Case {
        options: "paper,weigh=q",
        dim: 64,
        kv_heads: 2,
        ratio: 3,
        prompts: &[127, 700],
        steps: 40,
        pieces: 2,
        ..WHOLE
    },
    Case {
        options: "bits=3,boost=5,group=32",
        dim: 72,
        kv_heads: 2,
        ratio: 3,
        prompts: &[203, 90],
        steps: 5,
        pieces: 3,
        ..WHOLE
    },
    Case {
        options: "bits=4,boost=20,clip=k,group=32,outliers=16,extra=254",
        dim: 64,
        kv_heads: 1,
        ratio: 7,
        prompts: &[203, 90],
        steps: 5,
        pieces: 2,
        ..WHOLE
    },
    Case {
        options: "k_bits=8,group=64",
        dim: 72,
        kv_heads: 1,
        ratio: 3,
        prompts: &[300],
        steps: 3,
        pieces: 2,
        ..WHOLE
    },
    // Some groups without queries, some with a few.
    Case {
        options: "",
        dim: 64,
        kv_heads: 1,
        ratio: 7,
        prompts: &[1280],
        steps: 3,
        pieces: 4,
        silent: Some(1),
        ..WHOLE
    },
    Case {
        options: "boost=0,group=32,k_bits=3",
        dim: 128,
        kv_heads: 2,
        ratio: 1,
        prompts: &[250, 200],
        steps: 40,
        pieces: 3,
        silent: Some(2),
        ..WHOLE
    },
];

pub fn run(kernels: &Kernels, quick: bool) -> Result<()> {
    structs_are_the_same(kernels)?;
    let cases = CASES.iter().take(if quick { 3 } else { CASES.len() });
    judge_cases(kernels, cases, &[Dtype::F16, Dtype::Bf16, Dtype::F32])?;
    refuses_what_f16_cannot_hold(kernels)?;
    println!("conformance: all cases agree");
    Ok(())
}

/// The same for some types, and only for short prompts where `short` says so.
#[allow(dead_code)]
pub fn judge(kernels: &Kernels, short: bool, dtypes: &[Dtype]) -> Result<()> {
    structs_are_the_same(kernels)?;
    let is_short = |case: &&Case| !short || case.prompts.iter().sum::<usize>() <= 1300;
    judge_cases(kernels, CASES.iter().filter(is_short), dtypes)?;
    refuses_what_f16_cannot_hold(kernels)
}

fn judge_cases<'a>(
    kernels: &Kernels,
    cases: impl Iterator<Item = &'a Case>,
    dtypes: &[Dtype],
) -> Result<()> {
    for case in cases {
        for dtype in dtypes {
            match dtype {
                Dtype::F16 => check::<f16>(kernels, case, *dtype)?,
                Dtype::Bf16 => check::<bf16>(kernels, case, *dtype)?,
                Dtype::F32 => check::<f32>(kernels, case, *dtype)?,
            }
        }
    }
    Ok(())
}

/// A number as this device's type.
pub trait Number: Element + cudarc::driver::DeviceRepr {
    fn of(x: f32) -> Self;
    fn wide(self) -> f32;
}

impl Number for f16 {
    fn of(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}

impl Number for bf16 {
    fn of(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}

impl Number for f32 {
    fn of(x: f32) -> Self {
        x
    }
    fn wide(self) -> f32 {
        self
    }
}

/// Every field that the device reads is the one that was written, and every section of a page lies where it should.
fn structs_are_the_same(kernels: &Kernels) -> Result<()> {
    for (options, k_dim, v_dim) in [
        ("", 128, 128),
        ("", 64, 64),
        ("paper", 96, 256),
        ("k_bits=3,v_bits=4,outliers=16", 8, 1024),
        ("bits=8,group=32,outliers=0", 576, 512),
        ("boost=5,group=64", 80, 136),
    ] {
        let config = OttConfig::parse(options)?;
        let layout = PageLayout::new(&config, 5, 3, k_dim, v_dim)?;
        let layer = Layer {
            pages: 1 << 40,
            staging: 2 << 40,
            samples: 3 << 40,
            traced: 4 << 40,
            places: 5 << 40,
            faults: 6 << 40,
            kv_heads: 3,
            k_dim: k_dim as u32,
            v_dim: v_dim as u32,
            group: layout.group_size as u32,
            k_bits: layout.k_bits.into(),
            v_bits: layout.v_bits.into(),
            outliers: layout.outliers as u32,
            extra: 33,
            clip: 1,
            boosted: layout.boosted as u32,
            rotate: 77,
            weigh: 78,
            num_heads: 79,
            number: 80,
        };
        let row = abi::Row {
            past: 11,
            fresh: 12,
            sealed_before: 13,
            sealed: 14,
            table: 15,
            chunk_before: std::array::from_fn(|i| 20 + i as u32),
            chunk: std::array::from_fn(|i| 30 + i as u32),
        };
        let fresh = Fresh {
            data: 8 << 40,
            row: -41,
            head: 42 << 40,
            token: 43,
        };
        let item = abi::Item {
            row: 51,
            window: 52,
            from: 53,
            to: 54,
            first: [55, 56, 57, 58],
        };
        let query = Query {
            q: 9 << 40,
            row: 61 << 40,
            head: -62,
            out: 10 << 40,
            sums: 11 << 40,
            arrived: 12 << 40,
            num_heads: 63,
            scale: 0.25,
            softcap: 30.0,
        };
        let prompt = Prompt {
            q: Fresh {
                data: 13 << 40,
                ..fresh
            },
            k: Fresh { row: 71, ..fresh },
            v: Fresh {
                token: -72,
                ..fresh
            },
            out: 14 << 40,
            sums: 15 << 40,
            tokens: 73,
            splits: 74,
            scale: 0.75,
            softcap: 50.0,
        };
        let numbers = |x: &[u32]| x.iter().map(|x| u64::from(*x)).collect::<Vec<_>>();
        let sections = [
            layout.k_codes.start,
            layout.k_scale.start,
            layout.k_min.start,
            layout.v_codes.start,
            layout.v_scale.start,
            layout.v_min.start,
            layout.pool.start,
            layout.k_high.start,
            layout.k_boosted.start,
            layout.head_bytes,
        ];
        let expected = [
            (1..7).map(|i| i << 40).collect(),
            numbers(&[
                layer.kv_heads,
                layer.k_dim,
                layer.v_dim,
                layer.group,
                layer.k_bits,
                layer.v_bits,
                layer.outliers,
                layer.extra,
                layer.clip,
                layer.boosted,
                layer.rotate,
                layer.weigh,
                layer.num_heads,
                layer.number,
            ]),
            numbers(&[11, 12, 13, 14, 15]),
            numbers(&row.chunk_before),
            numbers(&row.chunk),
            vec![fresh.data, -41i64 as u64, 42 << 40, 43],
            numbers(&[51, 52, 53, 54]),
            numbers(&item.first),
            vec![
                query.q,
                61 << 40,
                -62i64 as u64,
                10 << 40,
                11 << 40,
                12 << 40,
            ],
            numbers(&[63, 0.25f32.to_bits(), 30f32.to_bits()]),
            [prompt.q, prompt.k, prompt.v]
                .iter()
                .flat_map(|x| [x.data, x.row as u64, x.head as u64, x.token as u64])
                .collect(),
            vec![prompt.out, prompt.sums],
            numbers(&[73, 74, 0.75f32.to_bits(), 50f32.to_bits()]),
            [PARTIAL, TILE_QUERIES, CLEAR_QUERIES]
                .map(|n| n as u64)
                .to_vec(),
            sections.map(|at| at as u64).to_vec(),
        ]
        .concat();
        let found = kernels.probe(layer, row, fresh, item, (query, prompt))?;
        ensure!(
            found == expected,
            "the device reads {found:?} where {expected:?} was written ({options})"
        );
    }
    Ok(())
}

/// A layer that traces, or would.
pub fn spec(options: &str, kv_heads: usize, dim: usize) -> Result<LayerSpec> {
    let config = OttConfig::parse(options)?;
    Ok(LayerSpec {
        layer: 5,
        config,
        layout: PageLayout::new(&config, 5, kv_heads, dim, dim)?,
        ops: CpuOps::available()[0],
    })
}

/// What kernels are told of it.
pub fn shape(spec: &LayerSpec) -> LayerShape {
    let (layout, config) = (&spec.layout, &spec.config);
    LayerShape {
        layer: spec.layer,
        num_kv_heads: layout.num_kv_heads,
        k_dim: layout.k_dim,
        v_dim: layout.v_dim,
        group_size: layout.group_size,
        k_bits: layout.k_bits,
        v_bits: layout.v_bits,
        outliers: layout.outliers,
        extra: config.extra,
        clip: config.clip as u32,
        boosted: layout.boosted,
        rotate: config.rotation == Rotation::Values,
        weigh: config.weigh == Weigh::Queries,
        head_bytes: layout.head_bytes,
    }
}

fn check<E: Number>(kernels: &Kernels, case: &Case, dtype: Dtype) -> Result<()> {
    let spec = spec(case.options, case.kv_heads, case.dim)?;
    let (heads, dim, group) = (case.kv_heads, case.dim, spec.config.group_size);
    let num_heads = heads * case.ratio;
    let stream = kernels.stream();
    let longest = |p: &usize| (p + case.steps).div_ceil(group);
    let blocks: usize = 1 + case.prompts.iter().map(longest).sum::<usize>();
    let chunks = case.prompts.len() * (group + spec.config.residual) / 32;
    let cpu = Cache::<E>::new(vec![spec.clone()], blocks, case.prompts.len());
    let mut gpu = DeviceLayer::new(kernels, shape(&spec), dtype, num_heads, blocks, chunks)?;
    // Every byte of a page is the kernels' to write.
    let garbage = vec![0xcd; gpu.pages.num_bytes()];
    stream.memcpy_htod(&garbage, &mut gpu.pages)?;
    let mut states = Blocks::new(blocks, chunks, group, spec.config.residual);
    // Blocks in a shuffled order.
    let mut noise = Noise::new(case.dim as u64 + 7);
    let mut ids: Vec<usize> = (1..blocks).collect();
    for i in (1..ids.len()).rev() {
        ids.swap(i, noise.below(i + 1));
    }
    let mut tables = Vec::new();
    for prompt in case.prompts {
        tables.push(ids.split_off(ids.len() - longest(prompt)));
    }
    let mut past = vec![0; case.prompts.len()];
    let (mut worst, mut traced) = ([0f64; KERNELS.len()], 0);
    let all = case.pieces + case.steps;
    for step in 0..all {
        let decodes = step >= case.pieces;
        let piece =
            |prompt: &usize| prompt * (step + 1) / case.pieces - prompt * step / case.pieces;
        let new: Vec<usize> = match decodes {
            false => case.prompts.iter().map(piece).collect(),
            true => vec![1; past.len()],
        };
        let tokens = new.iter().copied().max().unwrap_or(0);
        let paint = |noise: &mut Noise, is_key: bool| -> Vec<E> {
            let of_row = |noise: &mut Noise| match is_key {
                true => keys(noise, heads, tokens, dim),
                false => values(noise, heads * tokens * dim),
            };
            let rows = (0..past.len()).flat_map(|_| of_row(noise));
            rows.map(|x| E::of(x.to_f32())).collect()
        };
        let (k, v) = (paint(&mut noise, true), paint(&mut noise, false));
        let q = match decodes {
            false => queries(&mut noise, past.len() * num_heads, tokens, dim),
            true => values(&mut noise, past.len() * num_heads * dim),
        };
        let q: Vec<E> = q.into_iter().map(|x| E::of(x.to_f32())).collect();
        let asked = case.silent != Some(step);

        let rows: Vec<Row<'_>> = (0..past.len())
            .map(|r| Row {
                seq: r,
                past: past[r],
                new: new[r],
                table: &tables[r],
            })
            .collect();
        let plans = cpu.begin(&rows)?;
        let width = heads * tokens * dim;
        let mut turned = v.clone();
        turn(&mut turned, dim, &spec.config, rotate);
        let of_row = |x: &'_ [E], r: usize, width: usize| x[r * width..(r + 1) * width].to_vec();
        let inputs = (0..past.len()).map(|r| {
            let q = of_row(&q, r, case.ratio * width);
            (q, of_row(&k, r, width), of_row(&turned, r, width))
        });
        let inputs: Vec<_> = inputs.collect();
        let stored = plans.iter().zip(&inputs).map(|(row, (q, k, v))| NewTokens {
            row,
            q: asked.then_some(NewQueries {
                tokens: Tokens::contiguous(q, tokens, dim),
                num_heads,
            }),
            k: Tokens::contiguous(k, tokens, dim),
            v: Tokens::contiguous(v, tokens, dim),
        });
        let faults = cpu.append(0, &stored.collect::<Vec<_>>())?;
        ensure!(faults.is_empty(), "{faults:?}");
        cpu.end(|_| false)?;

        let (lanes, slots) = gpu.lanes_and_slots();
        let upload = |rows: &[RowPlan]| {
            DevicePlan::upload(&Plan::new(rows, group, lanes, slots), lanes, stream)
        };
        let on_gpu = states.begin(&rows, |wave| {
            gpu.append(
                &upload(wave)?,
                Fresh::NOTHING,
                Fresh::NOTHING,
                Fresh::NOTHING,
            )
        })?;
        ensure!(on_gpu == plans, "both plan the same");
        let plan = upload(&plans)?;
        let (k, v) = (stream.clone_htod(&k)?, stream.clone_htod(&v)?);
        let device_q = stream.clone_htod(&q)?;
        let fresh = |data, heads: usize| Fresh {
            data,
            row: (heads * tokens * dim) as i64,
            head: (tokens * dim) as i64,
            token: dim as i64,
        };
        let asking = match asked {
            true => fresh(address(&device_q, stream), num_heads),
            false => Fresh::NOTHING,
        };
        gpu.append(
            &plan,
            asking,
            fresh(address(&k, stream), heads),
            fresh(address(&v, stream), heads),
        )?;
        ensure!(plan.faults(stream)?.iter().all(Option::is_none), "a fault");
        states.end(|_| false);

        if decodes {
            let scale = 1.0 / (dim as f32).sqrt();
            let wide: Vec<f32> = q.iter().map(|x| x.wide() * scale).collect();
            let softcap = (case.softcap > 0.0).then_some(case.softcap);
            let queries = Queries {
                q: &wide,
                num_heads,
                tokens: 1,
                softcap,
            };
            let mut expected = vec![0f32; q.len()];
            decode(&*cpu.layer(0)?, &plans, &queries, &mut expected);
            if spec.config.rotation == Rotation::Values {
                expected.chunks_exact_mut(dim).for_each(rotate_back);
            }
            let out = stream.clone_htod(&vec![E::of(f32::NAN); q.len()])?;
            let sums = stream.clone_htod(&vec![
                f32::NAN;
                plan.num_items * num_heads * (dim + PARTIAL)
            ])?;
            let query = Query {
                q: address(&device_q, stream),
                row: (num_heads * dim) as i64,
                head: dim as i64,
                out: address(&out, stream),
                sums: address(&sums, stream),
                arrived: 0,
                num_heads: num_heads as u32,
                scale: scale * std::f32::consts::LOG2_E,
                softcap: case.softcap,
            };
            for (kind, kernel) in KERNELS.into_iter().enumerate() {
                if !gpu.has(kernel) {
                    continue;
                }
                gpu.decode_by(kernel, &plan, query)?;
                let found = stream.clone_dtoh(&out)?;
                for (e, f) in expected.chunks(dim).zip(found.chunks(dim)) {
                    let largest = e.iter().fold(0f32, |m, x| m.max(x.abs()));
                    for (e, f) in e.iter().zip(f) {
                        let error = f64::from((e - f.wide()).abs() / largest);
                        ensure!(!error.is_nan(), "an output is not a number");
                        worst[kind] = worst[kind].max(error);
                    }
                }
            }
        }
        past.iter_mut()
            .zip(&new)
            .for_each(|(past, new)| *past += new);
        if !decodes || step + 1 == all {
            traced = same_pages(&cpu, &gpu, &tables, stream)?;
            same_past(&cpu, &gpu, &at_rest(&plans), stream)?;
        }
    }
    println!(
        "{:40} head {:3} gqa {} {:?}: pages equal, {traced:3} traced, error {:.1e} clear, {:.1e} narrow, {:.1e} wide",
        case.options, dim, case.ratio, dtype, worst[0], worst[1], worst[2]
    );
    let slack = if dtype == Dtype::Bf16 { BF16 } else { 0.0 };
    for ((kernel, worst), budget) in KERNELS.iter().zip(worst).zip([CLEAR, TUNED, TUNED]) {
        let is_close = worst <= budget + slack;
        ensure!(is_close, "the kernel {kernel:?} is off by {worst}");
    }
    Ok(())
}

/// Values into the basis in which they are kept, or back.
fn turn<E: Number>(values: &mut [E], dim: usize, config: &OttConfig, way: fn(&mut [f32])) {
    if config.rotation == Rotation::None {
        return;
    }
    for values in values.chunks_exact_mut(dim) {
        let mut wide: Vec<f32> = values.iter().map(|x| x.wide()).collect();
        way(&mut wide);
        values.iter_mut().zip(wide).for_each(|(v, x)| *v = E::of(x));
    }
}

/// Rows that bring nothing: for reading what is stored.
fn at_rest(plans: &[RowPlan]) -> Vec<RowPlan> {
    let rest = |plan: &RowPlan| RowPlan {
        past: plan.end(),
        new: 0,
        pages_before: plan.pages,
        chunks_before: plan.chunks.clone(),
        ..plan.clone()
    };
    plans.iter().map(rest).collect()
}

/// Pages byte for byte and traced tokens bit for bit; how many there are.
fn same_pages<E: Number>(
    cpu: &Cache<E>,
    gpu: &DeviceLayer,
    tables: &[Vec<usize>],
    stream: &Arc<cudarc::driver::CudaStream>,
) -> Result<usize> {
    let layer = cpu.layer(0)?;
    let layout = &layer.spec().layout;
    let pages = stream.clone_dtoh(&gpu.pages)?;
    let (places, bytes) = gpu.traced_bytes()?;
    let size = size_of::<E>();
    let mut count = 0;
    for &block in tables.iter().flatten() {
        let Some(expected) = cpu.page(0, block) else {
            continue;
        };
        let found = &pages[block * expected.len()..(block + 1) * expected.len()];
        if let Some(at) = (0..expected.len()).find(|i| expected[*i] != found[*i]) {
            anyhow::bail!(
                "block {block} differs at byte {at} of {} a head: {} and {}",
                layout.head_bytes,
                expected[at],
                found[at]
            );
        }
        for head in 0..layout.num_kv_heads {
            for (i, _) in layer.head(block, head).traced().iter().enumerate() {
                let place = places[(block * layout.num_kv_heads + head) * layout.outliers + i];
                let width = layout.k_dim + layout.v_dim;
                let found = &bytes[place as usize * width * size..][..width * size];
                let (k, v) = layer.traced(block, head, i);
                let numbers = k.iter().chain(v).map(|x| x.wide());
                let found = found.chunks_exact(size).map(|b| match size {
                    4 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
                    _ if is_bf16::<E>() => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
                    _ => f16::from_le_bytes([b[0], b[1]]).to_f32(),
                });
                ensure!(numbers.eq(found), "a traced token differs");
                count += 1;
            }
        }
    }
    Ok(count)
}

fn is_bf16<E: 'static>() -> bool {
    std::any::TypeId::of::<E>() == std::any::TypeId::of::<bf16>()
}

/// All that is stored, read back as numbers.
fn same_past<E: Number>(
    cpu: &Cache<E>,
    gpu: &DeviceLayer,
    rows: &[RowPlan],
    stream: &Arc<cudarc::driver::CudaStream>,
) -> Result<()> {
    let (lanes, slots) = gpu.lanes_and_slots();
    let layer = cpu.layer(0)?;
    let layout = &layer.spec().layout;
    let group = layout.group_size;
    let plan = DevicePlan::upload(&Plan::new(rows, group, lanes, slots), lanes, stream)?;
    for (r, row) in rows.iter().enumerate() {
        let (k, mut v) = layer.gather(&row.before());
        turn(&mut v, layout.v_dim, &layer.spec().config, rotate_back);
        let nan = |len: usize| stream.clone_htod(&vec![E::of(f32::NAN); len]);
        // In two parts, which are put together again.
        for tokens in [0..row.past / 3, row.past / 3..row.past] {
            let part = |x: &[E], dim: usize| -> Vec<E> {
                let heads = x.chunks(row.past * dim);
                let of = |head: &[E]| head[tokens.start * dim..tokens.end * dim].to_vec();
                heads.flat_map(of).collect()
            };
            let (k, v) = (part(&k, layout.k_dim), part(&v, layout.v_dim));
            let (found_k, found_v) = (nan(k.len())?, nan(v.len())?);
            let (to_k, to_v) = (address(&found_k, stream), address(&found_v, stream));
            if tokens.is_empty() {
                continue;
            }
            let range = tokens.start as u32..tokens.end as u32;
            gpu.gather(&plan, r as u32, range, to_k, to_v)?;
            for (expected, found) in [(k, found_k), (v, found_v)] {
                let found = stream.clone_dtoh(&found)?;
                let same = expected
                    .iter()
                    .zip(&found)
                    .all(|(e, f)| e.wide() == f.wide());
                ensure!(same, "the past of row {r} reads differently");
            }
        }
    }
    Ok(())
}

fn refuses_what_f16_cannot_hold(kernels: &Kernels) -> Result<()> {
    // Bad numbers of token 3: one, or all.
    let cases = [
        (f32::NAN, 1, 200),
        (65520.0, 1, 200),
        (f32::NAN, 64, 200),
        (1e6, 1, 200),
        (f32::INFINITY, 1, 5),
    ];
    for (bad, count, tokens) in cases {
        let spec = spec("", 1, 64)?;
        let stream = kernels.stream();
        let gpu = DeviceLayer::new(kernels, shape(&spec), Dtype::F32, 1, 4, 10)?;
        let mut states = Blocks::new(4, 10, 128, 32);
        let row = Row {
            seq: 1,
            past: 0,
            new: tokens,
            table: &[1, 2, 3],
        };
        let rows = states.begin(&[row], |_| Ok::<_, anyhow::Error>(()))?;
        let plan = DevicePlan::upload(&Plan::new(&rows, 128, 1, 100), 1, stream)?;
        let mut numbers = vec![0.5f32; tokens * 64];
        let q = stream.clone_htod(&numbers)?;
        numbers[3 * 64 + 64 - count..4 * 64].fill(bad);
        let numbers = stream.clone_htod(&numbers)?;
        let fresh = |x| Fresh {
            data: address(x, stream),
            row: 0,
            head: 0,
            token: 64,
        };
        gpu.append(&plan, fresh(&q), fresh(&numbers), fresh(&numbers))?;
        ensure!(
            plan.faults(stream)? == [Some(5)],
            "{bad} among {tokens} tokens must be told"
        );
        let beside = gpu.page(2)?;
        ensure!(
            beside.iter().all(|b| *b == 0),
            "what cannot be sealed wrote into the page beside it"
        );
    }
    Ok(())
}
