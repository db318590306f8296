//! The egress proxy as a guest meets it: a process of its own between three network namespaces.
//!
//! ```text
//!   guest 10.42.0.2 ──veth── 10.42.0.1 vm (nft redirect)      outside: 8.8.4.4, 9.9.9.9, …
//!                                        └─ fds 3, 4 ─ proxy process ─┘
//! ```
//!
//! All three namespaces are the test's own, so addresses that look public belong to it. Needs
//! root, `ip` and `nft`; without root every test says that it is skipped.

#[cfg(test)]
mod process;
#[cfg(test)]
mod traffic;
#[cfg(test)]
mod world;
