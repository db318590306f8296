//! How long it takes to find where a host leads, among ten and among a hundred thousand.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion};
use spore_gateway::HostTable;

fn hosts(count: usize) -> Vec<String> {
    (0..count)
        .map(|number| format!("app-{number}--account-{}.example.org", number % 97))
        .collect()
}

fn look_up(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("route");
    for count in [10, 1_000, 100_000] {
        let hosts = hosts(count);
        let table = HostTable::default();
        for host in &hosts {
            table.insert(host, Arc::new(()));
        }
        // A thousand hosts are asked for at most, spread over the table: what is measured is the
        // table, and not how many names fit the processor's cache.
        let asked: Vec<&String> = hosts.iter().step_by(count.div_ceil(1_000)).collect();
        let mut next = 0;
        group.bench_function(BenchmarkId::new("get", count), |bencher| {
            bencher.iter(|| {
                next = (next + 1) % asked.len();
                black_box(table.get(black_box(asked[next])))
            });
        });
        group.bench_function(BenchmarkId::new("replace", count), |bencher| {
            bencher.iter(|| {
                next = (next + 1) % asked.len();
                black_box(table.insert(black_box(asked[next]), Arc::new(())))
            });
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    look_up(&mut criterion);
    criterion.final_summary();
}
