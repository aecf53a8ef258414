//! Head parsing under criterion, for looking into one change: `cargo bench --package preflightd-benches --bench head`.
#![forbid(unsafe_code)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use preflightd::http::{Head, HeadLimits, HeadReader};
use preflightd_benches::policies::{self, Size};
use std::hint::black_box;

const LIMITS: HeadLimits = HeadLimits { max_bytes: 8 * 1024 };

fn head(criterion: &mut Criterion) {
    let request = policies::requests(Size::SMALL, 1).remove(0).keep_alive;
    let mut group = criterion.benchmark_group("head");
    group.throughput(Throughput::Bytes(request.len() as u64));
    group.bench_function("a Chrome preflight at once", |bencher| {
        bencher.iter(|| is_preflight(&HeadReader::new().read(black_box(&request), LIMITS)));
    });
    group.bench_function("a Chrome preflight byte by byte", |bencher| {
        bencher.iter(|| {
            let mut reader = HeadReader::new();
            (1..=request.len()).any(|end| is_preflight(&reader.read(black_box(&request[..end]), LIMITS)))
        });
    });
    group.bench_function("httparse alone", |bencher| {
        bencher.iter(|| {
            let mut headers = [httparse::EMPTY_HEADER; 64];
            httparse::Request::new(&mut headers).parse(black_box(&request)).map(|status| status.is_complete())
        });
    });
    group.finish();
}

fn is_preflight(head: &Head<'_>) -> bool {
    matches!(head, Head::Preflight(_))
}

criterion_group!(benches, head);
criterion_main!(benches);
