//! `decide` under criterion, for looking into one change: `cargo bench --package preflightd-benches --bench decide`.
#![forbid(unsafe_code)]

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use preflightd::policy::Decision;
use preflightd_benches::{
    acrh,
    policies::{self, HEADERS, Size},
};
use std::hint::black_box;

const ASKED: &[&[u8]] = &[b"authorization,content-type"];

fn decide(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decide");
    for (hosts, routes, origins) in [(1, 1, 5), (10, 10, 50), (100, 10, 50), (1000, 10, 50)] {
        let size = Size { hosts, routes, origins };
        let table = policies::table(&policies::specs(size));
        let all: Vec<_> = policies::combinations(size, 4096).collect();
        let mut next = all.iter().cycle();
        group.bench_function(BenchmarkId::from_parameter(format!("{hosts}x{routes}x{origins}")), |bencher| {
            bencher.iter(|| {
                let of = next.next().expect("it never ends");
                matches!(table.decide(black_box(&policies::preflight(of, ASKED))), Decision::Answer(_))
            });
        });
    }
    group.finish();
}

fn hostile_headers(criterion: &mut Criterion) {
    let of = policies::combinations(Size::SMALL, 1).next().expect("there is one");
    for (policy, specs) in [("listed", policies::specs(Size::SMALL)), ("echo", policies::echoing())] {
        let table = policies::table(&specs);
        let mut group = criterion.benchmark_group(format!("16 KiB of request headers, {policy}"));
        for (kind, value) in acrh::hostile(HEADERS[0], 16 * 1024) {
            let lines = [value.as_slice()];
            group.bench_function(kind, |bencher| {
                bencher.iter(|| {
                    matches!(table.decide(black_box(&policies::preflight(&of, &lines))), Decision::Answer(_))
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, decide, hostile_headers);
criterion_main!(benches);
