//! FP8 conversion of 8192 rows of 7168 elements, beyond any cache, against copies of as many bytes.
//! Throughput is of bytes read and written.
#![allow(unsafe_code)] // `stream` leaves the fence to its caller.

use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use half::bf16;
use railhop::numeric::{
    copy::{fence, stream},
    fp8::{ScaleFormat, dequantise, quantise, scale_groups},
};

const HIDDEN: usize = 7168;
const ROWS: usize = 8192;
const FORMATS: [ScaleFormat; 2] = [ScaleFormat::F32, ScaleFormat::Ue8m0];

fn benches(c: &mut Criterion) {
    let x: Vec<bf16> = (0..ROWS * HIDDEN).map(|i| bf16::from_f32((i as f32 * 0.37).sin())).collect();
    let mut codes = vec![0u8; ROWS * HIDDEN];
    let mut scales = vec![0u8; ROWS * scale_groups(HIDDEN) * 4];
    let stride = scale_groups(HIDDEN) * 4;

    let mut group = c.benchmark_group("quantise");
    for format in FORMATS {
        group.throughput(Throughput::Bytes((ROWS * HIDDEN * 3) as u64));
        group.bench_function(format!("{format:?}"), |b| {
            b.iter(|| {
                let rows = x.chunks(HIDDEN).zip(codes.chunks_mut(HIDDEN)).zip(scales.chunks_mut(stride));
                rows.for_each(|((x, codes), scales)| quantise(x, format, codes, scales));
            });
        });
    }
    copies(&mut group, ROWS * HIDDEN * 3 / 2);
    group.finish();

    let mut out = vec![0f32; ROWS * HIDDEN];
    let mut group = c.benchmark_group("dequantise");
    for format in FORMATS {
        // Scales of 1.0, so that neither format meets denormals the other does not.
        match format {
            ScaleFormat::F32 => scales.as_chunks_mut().0.fill(1f32.to_le_bytes()),
            ScaleFormat::Ue8m0 => scales.fill(127),
        }
        group.throughput(Throughput::Bytes((ROWS * HIDDEN * 5) as u64));
        group.bench_function(format!("{format:?}"), |b| {
            b.iter(|| {
                let rows = codes.chunks(HIDDEN).zip(scales.chunks(stride)).zip(out.chunks_mut(HIDDEN));
                rows.for_each(|((codes, scales), out)| dequantise(codes, format, scales, out));
            });
        });
    }
    copies(&mut group, ROWS * HIDDEN * 5 / 2);
    group.finish();
}

/// Copies of `bytes` bytes, which read and write as much as the conversion they are compared with.
fn copies(group: &mut BenchmarkGroup<WallTime>, bytes: usize) {
    let (src, mut dst) = (vec![1u8; bytes], vec![0u8; bytes]);
    group.throughput(Throughput::Bytes(2 * bytes as u64));
    group.bench_function("copy", |b| b.iter(|| dst.copy_from_slice(&src)));
    group.bench_function("stream", |b| {
        b.iter(|| {
            // SAFETY: fenced, and only this thread reads `dst`.
            unsafe { stream(&mut dst, &src) };
            fence();
        });
    });
}

criterion_group!(fp8, benches);
criterion_main!(fp8);
