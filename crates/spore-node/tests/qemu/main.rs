//! The `qemu` driver with real namespaces, cgroups and QEMU, or `kvm` where `SPORE_TEST_DRIVER`
//! asks for it. Needs root; `host.rs` has the rest.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::tests_outside_test_module,
    reason = "the whole program is tests: a failed step ends its test, and a skip is said"
)]

mod agent;
mod ahead;
mod confinement;
mod deaths;
mod folder;
mod fork;
mod guest;
mod host;
mod hundred;
mod individuals;
mod kill_points;
mod life;
mod live;
mod load;
mod network;
mod parked;
mod rates;
mod recovery;
mod secrets;
mod suspends;
mod taken;
mod takes;
mod thaw;

#[path = "../bin/driver.rs"]
mod driver;

#[path = "../bin/orders.rs"]
mod orders;
