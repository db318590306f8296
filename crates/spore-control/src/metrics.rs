//! Prometheus metrics of the platform: wakes by phase, requests, states, failures.
//!
//! Written by the reconcilers and the gateway's reports, read by `GET /metrics`. Labels come from
//! fixed sets, never from names of apps, so that their number is bounded.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use spore_wire::gateway::Counts;
use spore_wire::node::{MemoryStatus, TemplateMiss, VmStatus};

type Label = [(&'static str, String); 1];

/// Upper bounds of the wake histogram in seconds: from a fork in milliseconds to a cold boot.
const WAKE_BUCKETS: [f64; 14] = [
    0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];

/// Phases that have a histogram of their own; others count as `other`.
const PHASES: [&str; 8] = [
    "queue", "prepare", "boot", "fork", "agent", "thaw", "app", "total",
];

fn begun_from(status: &VmStatus) -> &'static str {
    match status.missed {
        Some(TemplateMiss::None) => "boot_no_template",
        Some(TemplateMiss::Building) => "boot_template_building",
        Some(TemplateMiss::Failed) => "boot_template_failed",
        Some(TemplateMiss::NoRoom) => "boot_template_no_room",
        Some(TemplateMiss::Unsupported) => "boot_unsupported",
        None if status.source.is_boot() => "boot",
        None if status.is_warm => "ready_template",
        None => "template",
    }
}

/// All metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    wake_seconds: Family<Label, Histogram, fn() -> Histogram>,
    starts: Family<Label, Counter>,
    requests: Family<Label, Counter>,
    waits: Family<Label, Counter>,
    apps: Family<Label, Gauge>,
    failures: Family<Label, Counter>,
    api_calls: Family<Label, Counter>,
    memory_lookups: Family<Label, Counter>,
    memory_bytes: Family<Label, Gauge>,
}

impl Default for Metrics {
    fn default() -> Self {
        let histogram: fn() -> Histogram = || Histogram::new(WAKE_BUCKETS);
        let mut metrics = Self {
            registry: Registry::default(),
            wake_seconds: Family::new_with_constructor(histogram),
            starts: Family::default(),
            requests: Family::default(),
            waits: Family::default(),
            apps: Family::default(),
            failures: Family::default(),
            api_calls: Family::default(),
            memory_lookups: Family::default(),
            memory_bytes: Family::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let registry = &mut self.registry;
        let wake = self.wake_seconds.clone();
        registry.register("spore_wake_seconds", "Time to start a VM, by phase", wake);
        let starts = self.starts.clone();
        registry.register(
            "spore_starts",
            "VMs that became ready, by what they began from: a template, or a boot and why",
            starts,
        );
        let requests = self.requests.clone();
        registry.register(
            "spore_requests",
            "Answers to visitors, by status class",
            requests,
        );
        let waits = self.waits.clone();
        registry.register(
            "spore_request_waits",
            "Requests held for a wake, by outcome",
            waits,
        );
        registry.register("spore_apps", "Apps, by state", self.apps.clone());
        let failures = self.failures.clone();
        registry.register(
            "spore_failures",
            "Starts and VMs that failed, by code",
            failures,
        );
        let calls = self.api_calls.clone();
        registry.register(
            "spore_api_calls",
            "Answers of the API, by status class",
            calls,
        );
        registry.register(
            "spore_snapshot_memory_lookups",
            "Forks by whether the memory of their snapshot was there, and memories given up",
            self.memory_lookups.clone(),
        );
        registry.register(
            "spore_snapshot_memory_bytes",
            "Memories of snapshots that forks share: there, held by VMs, and the most there may be",
            self.memory_bytes.clone(),
        );
    }

    /// A VM became ready.
    pub(crate) fn woken(&self, status: &VmStatus) {
        let from = [("from", begun_from(status).to_owned())];
        self.starts.get_or_create(&from).inc();
        let mut total_us = 0;
        for phase in &status.phases {
            total_us += phase.us;
            let known = PHASES.iter().find(|name| **name == phase.name);
            self.observe(known.copied().unwrap_or("other"), phase.us);
        }
        self.observe("total", total_us);
    }

    fn observe(&self, phase: &str, us: u64) {
        let seconds = core::time::Duration::from_micros(us).as_secs_f64();
        let label = [("phase", phase.to_owned())];
        self.wake_seconds.get_or_create(&label).observe(seconds);
    }

    /// The gateway reported.
    pub(crate) fn counted(&self, counts: &Counts) {
        for (class, count) in counts.by_class.iter().enumerate() {
            let class = if class == 0 {
                "none".to_owned()
            } else {
                format!("{class}xx")
            };
            self.requests
                .get_or_create(&[("class", class)])
                .inc_by(*count);
        }
        for (outcome, count) in [
            ("waited", counts.waited),
            ("refused_full", counts.refused_full),
            ("vm_died", counts.vm_died),
        ] {
            let label = [("outcome", outcome.to_owned())];
            self.waits.get_or_create(&label).inc_by(count);
        }
    }

    /// A start, a wake or a VM failed.
    pub(crate) fn failed(&self, code: &str) {
        let label = [("code", code.to_owned())];
        self.failures.get_or_create(&label).inc();
    }

    /// The API answered.
    pub(crate) fn answered(&self, status: u16) {
        let label = [("class", format!("{}xx", status / 100))];
        self.api_calls.get_or_create(&label).inc();
    }

    fn remembered(&self, memories: &MemoryStatus) {
        for (outcome, count) in [
            ("hit", memories.hits),
            ("miss", memories.misses),
            ("evicted", memories.evictions),
        ] {
            let label = [("outcome", outcome.to_owned())];
            // Counted by the node, which this is of.
            let counter = self.memory_lookups.get_or_create(&label);
            counter.inner().store(count, Ordering::Relaxed);
        }
        for (of, bytes) in [
            ("there", memories.bytes),
            ("held", memories.held_bytes),
            ("budget", memories.budget_bytes),
        ] {
            let label = [("of", of.to_owned())];
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            self.memory_bytes.get_or_create(&label).set(bytes);
        }
    }

    /// The page, with apps counted by state, and what the node remembers.
    ///
    /// # Errors
    /// Never in practice: a `String` takes all text.
    pub(crate) fn page(
        &self,
        apps: &BTreeMap<&'static str, i64>,
        memories: &MemoryStatus,
    ) -> Result<String, core::fmt::Error> {
        self.remembered(memories);
        for (state, count) in apps {
            let label = [("state", (*state).to_owned())];
            self.apps.get_or_create(&label).set(*count);
        }
        let mut page = String::new();
        encode(&mut page, &self.registry)?;
        Ok(page)
    }
}
