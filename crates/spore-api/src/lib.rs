//! The public contract of Spore: nouns, requests, answers, error codes and limits.
//!
//! Used by the control plane, the CLI and every client. One noun per module. This crate holds no
//! behaviour beyond validation; with the feature `client` it also holds the typed async client.
//!
//! | route | module |
//! |---|---|
//! | `GET /api/v1/status` | [`status`] |
//! | `GET /api/v1/apps`, `GET·DELETE /api/v1/apps/{app}` | [`app`] |
//! | `POST /api/v1/apps/{app}/{stop,wake,restart,enable,disable,rollback}` | [`app`] |
//! | `POST /api/v1/sources` (`application/zstd`) | [`release`] |
//! | `GET·POST /api/v1/apps/{app}/releases` | [`release`] |
//! | `GET /api/v1/apps/{app}/secrets`, `PUT·DELETE …/secrets/{name}` | [`secret`] |
//! | `GET /api/v1/apps/{app}/logs` (`application/x-ndjson`) | [`log`] |
//! | `GET /api/v1/apps/{app}/exec` (WebSocket), `GET·PUT …/files?path=` | [`exec`] |
//! | `GET·POST /api/v1/images`, `DELETE …/images/{name}`, `POST /api/v1/images/gc` | [`image`] |
//! | `GET /api/v1/snapshots`, `GET·DELETE …/{id or tag}`, `POST …/compact` | [`snapshot`] |
//! | `POST /api/v1/snapshots/gc` | [`snapshot`] |
//! | `POST /api/v1/{apps,sandboxes}/{…}/checkpoint` | [`snapshot`] |
//! | `POST /api/v1/forks` | [`sandbox`] |
//! | `GET /api/v1/sandboxes`, `GET·DELETE …/{id}`, `POST …/rollback`, `GET …/exec` | [`sandbox`] |
//! | `GET /api/v1/operations/{id}` (`?wait_ms=`) | [`operation`] |
#![forbid(unsafe_code)]

pub mod app;
#[cfg(feature = "client")]
pub mod client;
pub mod error;
pub mod exec;
pub mod image;
pub mod limits;
pub mod log;
pub mod name;
pub mod operation;
pub mod page;
pub mod release;
pub mod sandbox;
pub mod secret;
pub mod snapshot;
pub mod span;
pub mod status;
