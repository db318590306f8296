//! Placeholder.
use crate::converge::Converge;
/// Api.
#[derive(Debug)]
pub struct Api;
impl Api {
    pub(crate) fn new(_c: Converge, _s: tokio::sync::watch::Receiver<bool>) -> Self {
        Self
    }
    /// Router.
    pub fn router(&self) -> axum::Router {
        axum::Router::new()
    }
}
